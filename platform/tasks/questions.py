"""Tokenised questions, and how they are cut into shards that any worker answers alike."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedloom.platform.data.federated import Int32
from fedloom.platform.data.tokens import encode, start_tokens
from fedloom.platform.errors import DataError, ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_tasks import TaskSection
from fedloom.platform.tasks.rows import Wording, worded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES_PER_SHARD = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """A tokenised question.

    Attributes:
        sequences: int32: the prompt with each choice in turn; for a generation the prompt alone.
        num_given: for each sequence, how many leading tokens are the prompt's.
        num_characters: of each choice, without the separator; empty for a generation.
        right: the index of the right choice.
        references: the texts that a generation is compared with.
        cut: whether the prompt lost its beginning for want of room.
    """

    sequences: tuple[Int32, ...]
    num_given: tuple[int, ...]
    num_characters: tuple[int, ...] = ()
    right: int = 0
    references: tuple[str, ...] = ()
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskShard:
    """Questions of one task that one worker answers in one call."""

    task: TaskSection
    questions: tuple[Question, ...]

    @property
    def generates(self) -> bool:
        """Whether answers are texts, which takes the tokenizer."""
        return self.task.kind == "generation"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedTask:
    """A task that is ready to be asked."""

    task: TaskSection
    shards: tuple[TaskShard, ...]

    @property
    def questions(self) -> list[Question]:
        """All questions, shorter ones first."""
        return [question for shard in self.shards for question in shard.questions]

    @property
    def num_read(self) -> int:
        """Tokens that the model reads when the task is asked once."""
        return sum(len(sequence) for question in self.questions for sequence in question.sequences)

    @property
    def num_written(self) -> int:
        """Tokens that it writes at most."""
        return self.task.max_new_tokens * len(self.questions) if self.task.kind == "generation" else 0

    def times(self, rounds: int) -> int:
        """Count how often it is asked in a run."""
        return sum(self.due(number, rounds) for number in range(rounds + 1))

    def due(self, number: int, rounds: int) -> bool:
        """Whether it is asked after round ``number`` of ``rounds``; 0 is the untrained model."""
        return number == rounds or (self.task.every is not None and number % self.task.every == 0)


def prepare_tasks(
    experiment: Experiment, tokenizer: "PreTrainedTokenizerBase", context_length: int | None
) -> tuple[PreparedTask, ...]:
    """Read, check, tokenise and shard the tasks of an experiment.

    Args:
        experiment: its ``evaluation.tasks``.
        tokenizer: the base model's.
        context_length: tokens that the model can read; ``None`` if it does not say.

    Raises:
        ExperimentError: the model is no language model, or a key asks for more tokens than it can read.
        DataError: the source, or one of its rows, cannot be used.
    """
    if experiment.evaluation.tasks and experiment.data.task != "causal_lm":
        raise ExperimentError(
            f"key evaluation.tasks: data.task is {experiment.data.task!r}, and only a language model answers "
            "questions. Set data.task to 'causal_lm', or leave evaluation.tasks out."
        )
    readable = min(context_length or sys.maxsize, tokenizer.model_max_length)
    return tuple(_prepared(experiment, index, tokenizer, readable) for index in range(len(experiment.evaluation.tasks)))


def _prepared(experiment: Experiment, index: int, tokenizer: "PreTrainedTokenizerBase", readable: int) -> PreparedTask:
    task, key = experiment.evaluation.tasks[index], f"key evaluation.tasks.{index}"
    room = _room(task, key, readable)
    asked = worded(experiment, index)
    encoder = _Encoder(tokenizer=tokenizer, start=tuple(start_tokens(tokenizer)), room=room, key=key)
    if task.kind == "multiple_choice":
        questions = encoder.with_choices(asked, task.separator)
    else:
        questions = encoder.to_be_continued(asked, task.max_new_tokens)
    questions.sort(key=lambda question: max(map(len, question.sequences)))  # stable: batches carry little padding
    size = max(1, BATCHES_PER_SHARD * experiment.evaluation.batch_size // max(len(q.sequences) for q in questions))
    shards = [questions[start : start + size] for start in range(0, len(questions), size)]
    return PreparedTask(task=task, shards=tuple(TaskShard(task=task, questions=tuple(shard)) for shard in shards))


def _room(task: TaskSection, key: str, readable: int) -> int:
    """Return how many tokens the longest sequence of a task may have, generated ones included."""
    room = task.max_length or readable
    if room > readable:
        raise ExperimentError(f"{key}.max_length: {room} is more than the {readable} tokens that the model can read.")
    if task.kind == "generation" and task.max_new_tokens >= room:
        raise ExperimentError(
            f"{key}.max_new_tokens: {task.max_new_tokens} leaves no token of {room} for the prompt. "
            f"Set it to at most {room - 1}."
        )
    return room


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoder:
    """Turns one task's questions into tokens.

    A prompt that does not fit loses its beginning, by the same number of tokens for all choices of a question.
    """

    tokenizer: "PreTrainedTokenizerBase"
    start: tuple[int, ...]
    room: int
    key: str

    def with_choices(self, asked: Sequence[Wording], separator: str) -> list[Question]:
        """Tokenise each prompt together with each of its choices, so that a token may span their boundary.

        What follows the prompt's own tokens is the choice's. White space at the end of the prompt goes to the choice,
        since many tokenizers join it to the word that comes next.
        """
        heads = [wording.prompt.rstrip() for wording in asked]
        texts = [wording.prompt + separator + choice for wording in asked for choice in wording.choices]
        wholes = iter(encode(self.tokenizer, texts, add_special_tokens=False))
        questions = []
        for wording, head in zip(asked, encode(self.tokenizer, heads, add_special_tokens=False), strict=True):
            own = [next(wholes) for _ in wording.choices]
            questions.append(self._with_choices(wording, own, len(head)))
        return questions

    def _with_choices(self, wording: Wording, wholes: Sequence[Sequence[int]], num_prompt: int) -> Question:
        if any(len(whole) <= num_prompt for whole in wholes):
            raise DataError(
                f"{self.key}.separator: {wording.place} has a choice that the tokenizer joins to the prompt's last "
                "token. Set separator to a space or a line break."
            )
        prompts = [
            self._prompt(whole[:num_prompt], max(map(len, wholes)) - num_prompt, wording.place) for whole in wholes
        ]
        sequences = [[*prompt, *whole[num_prompt:]] for prompt, whole in zip(prompts, wholes, strict=True)]
        return Question(
            sequences=tuple(np.array(sequence, np.int32) for sequence in sequences),
            num_given=tuple(map(len, prompts)),
            num_characters=tuple(map(len, wording.choices)),
            right=wording.right,
            cut=len(prompts[0]) < len(self._whole_prompt(wholes[0][:num_prompt])),
        )

    def to_be_continued(self, asked: Sequence[Wording], max_new_tokens: int) -> list[Question]:
        """Tokenise prompts that the model is to continue."""
        questions = []
        tokens = encode(self.tokenizer, [wording.prompt for wording in asked], add_special_tokens=False)
        for wording, own in zip(asked, tokens, strict=True):
            prompt = self._prompt(own, max_new_tokens, wording.place)
            questions.append(
                Question(
                    sequences=(np.array(prompt, np.int32),),
                    num_given=(len(prompt),),
                    references=wording.references,
                    cut=len(prompt) < len(self._whole_prompt(own)),
                )
            )
        return questions

    def _prompt(self, own: Sequence[int], num_answer: int, place: str) -> list[int]:
        """Return a prompt's tokens, cut at its beginning to leave room for those of the answer."""
        whole = self._whole_prompt(own)
        num_start = len(whole) - len(own)
        keep = self.room - num_answer - num_start
        if keep + num_start < 1 or keep < 0:
            raise DataError(
                f"{self.key}.max_length: {place} has a choice of {num_answer} tokens, which leaves none of {self.room} "
                "for the prompt. Shorten it, or raise max_length."
            )
        return whole if len(own) <= keep else [*whole[:num_start], *own[len(own) - keep :]]

    def _whole_prompt(self, own: Sequence[int]) -> list[int]:
        """Return a prompt as the model reads it: after what its texts begin with, and never empty."""
        start = list(self.start)
        if not start and not own:  # something must come before the first token that is predicted
            start = [self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self._end()]
        return [*start, *own]

    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError("key model.name: its tokenizer has no end-of-sequence token, which causal_lm needs.")
        return int(self.tokenizer.eos_token_id)
