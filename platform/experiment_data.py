"""The part of an experiment that says what is learnt, from which examples, and how they are spread over clients."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fedloom.platform.experiment_world import Fraction, Positive, PositiveFloat, Section


class Columns(Section):
    """How the source's columns are called. Classification reads text and label, causal_lm prompt and completion."""

    text: str = Field("text", description="classification: column of the text; causal_lm without a prompt: likewise")
    text_pair: str | None = Field(None, description="classification: column of a second text, e.g. a hypothesis")
    label: str = Field("label", description="column of the label; causal_lm: only to spread the examples by")
    prompt: str = Field("prompt", description="causal_lm: column of what is given")
    completion: str = Field("completion", description="causal_lm: column of what is learnt")
    input: str | None = Field(None, description="data.template: column of the input that goes with an instruction")
    client: str | None = Field(None, description="column of the natural client id, for `partition.kind: natural`")
    split: str | None = Field(None, description="column that says train or test; else `test_fraction` is cut by hash")


class DataSection(Section):
    """What is learnt, and from which examples."""

    source: str = Field(
        "builtin:stdlib", description="`builtin:stdlib`, a .jsonl, .json, .csv or .parquet file, or a hub dataset"
    )
    subset: str | None = Field(None, description="configuration name of a hub dataset")
    task: Literal["classification", "causal_lm"] = Field(
        "classification", description="the label of a text, or the text that goes on"
    )
    columns: Columns = Columns()
    train_split: str = Field("train", description="value of the split column, or split of a hub dataset")
    test_split: str = Field("test", description="likewise, for the held-out examples")
    test_fraction: Fraction = Field(0.2, description="share held out by hash where the source has no test split")
    max_length: Positive = Field(128, description="tokens kept of an example")
    template: Literal["alpaca"] | None = Field(
        None, description="causal_lm: wording around the prompt column, an instruction; null: it is taken as it is"
    )
    train_on_prompt: bool = Field(False, description="causal_lm: also learn the prompt's tokens")
    max_train_examples: Positive | None = Field(None, description="keep a seeded sample of the training examples")

    @model_validator(mode="after")
    def _columns_of_the_task(self) -> Self:
        if self.task == "causal_lm" and self.columns.text_pair is not None:
            raise ValueError("data.columns.text_pair is read in classification; use data.columns.prompt, or null")
        if self.task == "classification" and self.template is not None:
            raise ValueError("data.template is for causal_lm; set data.task to 'causal_lm', or data.template to null")
        if self.columns.input is not None and self.template is None:
            raise ValueError("data.columns.input needs the wording of a template; set data.template: alpaca, or null")
        return self


class PartitionSection(Section):
    """How the training examples are spread over clients."""

    kind: Literal["natural", "iid", "dirichlet", "shards", "quantity"] = Field(
        "natural", description="by a column; at random; by skewed labels; by dealt shards of labels; by skewed sizes"
    )
    num_clients: Positive | None = Field(None, description="number of clients; `natural` keeps the largest ones")
    alpha: PositiveFloat = Field(0.5, description="dirichlet: concentration over labels; small is skewed")
    shards_per_client: Positive = Field(2, description="shards: label-sorted shards that each client gets")
    exponent: PositiveFloat = Field(1.0, description="quantity: sizes follow (i + 1) ** exponent")
    min_examples: Positive = Field(1, description="clients with fewer training examples are refused or left out")
    client_test_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each client's examples that it never trains on and is scored on",
    )

    @model_validator(mode="after")
    def _count(self) -> Self:
        if self.kind != "natural" and self.num_clients is None:
            raise ValueError(f"partition.kind {self.kind!r} needs num_clients, e.g. num_clients: 20")
        return self
