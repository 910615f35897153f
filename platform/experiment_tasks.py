"""The experiment's section on evaluation tasks: questions that the global model answers."""

import re
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedloom.platform.experiment_world import Positive, Section

OF_KIND = {"multiple_choice": ("choices", "labels", "separator"), "generation": ("max_new_tokens", "stop")}
"""The keys that only one kind of task knows."""
PLACE = re.compile(r"([^\[\]{}]+)((?:\[[0-9]{1,4}\])*)")
"""A column, or a part of one: ``question``, ``choices.text``, ``choices[0]``."""


class TaskSection(Section):
    """One list of questions, how they are put, and how the answers are judged."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64, description="its metrics are eval/NAME/")
    kind: Literal["multiple_choice", "generation"] = Field(
        description="the likeliest of some answers, or a text that the model writes"
    )
    source: str | None = Field(
        None, description="a file or a hub dataset as in `data.source`; null: the held-out examples of `data`"
    )
    subset: str | None = Field(None, description="configuration name of a hub dataset")
    split: str | None = Field(None, description="split of a hub dataset, or value of a file's column `split`")
    prompt: str = Field("{prompt}", description="what the model reads; {column} stands for a row's value")
    answer: str = Field("answer", description="column of the right answer; generation: a text, or a list of them")
    choices: str | Annotated[tuple[str, ...], Field(min_length=2)] = Field(
        "choices", description="multiple_choice: a column that holds a list, or a template for every choice"
    )
    labels: str | Annotated[tuple[str, ...], Field(min_length=2)] | None = Field(
        None, description="multiple_choice: what the answer column calls the choices, given as `choices` are"
    )
    separator: str = Field(" ", description="multiple_choice: what stands between the prompt and a choice")
    max_new_tokens: Positive = Field(64, description="generation: tokens of an answer, at most")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="generation: texts that end an answer"
    )
    max_length: Positive | None = Field(
        None, description="tokens of prompt and answer, at most; by default what the model can read"
    )
    max_examples: Positive | None = Field(None, description="ask a seeded sample of the questions")
    every: Positive | None = Field(
        None, description="rounds between times that they are asked, from round 0 on; by default after the last only"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for kind, keys in OF_KIND.items():
            strange = sorted(self.model_fields_set.intersection(keys)) if kind != self.kind else []
            changed = [key for key in strange if getattr(self, key) != type(self).model_fields[key].default]
            if changed:
                raise ValueError(f"{changed[0]} belongs to tasks of kind {kind!r}, not {self.kind!r}")
        if self.source is None and (self.subset is not None or self.split is not None):
            raise ValueError("the held-out examples of `data` have no subset or split; set source as well")
        for template in (self.prompt, *_templates(self.choices), *_templates(self.labels)):
            parts_of(template)
        for place in (self.answer, *(each for each in (self.choices, self.labels) if isinstance(each, str))):
            if PLACE.fullmatch(place) is None:
                raise ValueError(f"{place!r} is no column; write e.g. answer, choices.text or choices[0]")
        return self


def _templates(choices: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return choices if isinstance(choices, tuple) else ()


def parts_of(template: str) -> list[tuple[str, str | None]]:
    """Return a template as pairs of text and the column that follows it; ``None`` where the template ends.

    Raises:
        ValueError: a brace without its partner, a conversion or a format, or a name that is no column's.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; double a brace that stands for itself") from None
    for _, place, form, conversion in parsed:
        if place is not None and (form or conversion or PLACE.fullmatch(place) is None):
            raise ValueError(f"template {template!r}: {{{place}}} must be a column alone, e.g. {{question}}")
    return [(text, place) for text, place, _, _ in parsed]
