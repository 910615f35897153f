"""Answering tokenised questions with the model, and judging the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedloom.platform.data.federated import Int32
from fedloom.platform.tasks.generation import exact_match, generate, rectangle, rouge_l
from fedloom.platform.tasks.questions import PreparedTask, TaskShard


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """Sums over the questions of one shard, by the metric's name."""

    count: int
    sums: Mapping[str, float]


def answer(model: Any, tokenizer: Any, shard: TaskShard, batch_size: int, *, pad_token_id: int) -> TaskScore:
    """Answer a shard and judge the answers.

    Args:
        model: a causal language model of Transformers in evaluation mode.
        tokenizer: its tokenizer; only generations need it.
        shard: the questions.
        batch_size: sequences that the model reads at once.
        pad_token_id: what fills a batch to a rectangle.
    """
    if shard.task.kind == "multiple_choice":
        sums = _chosen(model, shard, batch_size, pad_token_id)
    else:
        sums = _generated(model, tokenizer, shard, batch_size, pad_token_id)
    return TaskScore(count=len(shard.questions), sums=sums)


def task_metrics(task: PreparedTask, scores: Sequence[TaskScore]) -> dict[str, float]:
    """Return means over all questions of a task, added up in the order of its shards."""
    count = sum(score.count for score in scores)
    metrics = {name: sum(score.sums[name] for score in scores) / count for name in scores[0].sums}
    num_cut = sum(question.cut for question in task.questions)
    cut = {"cut_prompts": float(num_cut)} if num_cut else {}
    return {f"eval/{task.task.name}/{name}": value for name, value in (metrics | cut).items()}


def _chosen(model: Any, shard: TaskShard, batch_size: int, pad_token_id: int) -> dict[str, float]:
    """Count the questions whose right choice has the largest log-likelihood, as it is and by character.

    Of equal ones the first counts.
    """
    sequences = [sequence for question in shard.questions for sequence in question.sequences]
    num_given = [given for question in shard.questions for given in question.num_given]
    found = log_likelihoods(model, sequences, num_given, batch_size, pad_token_id=pad_token_id)
    sums = {"accuracy": 0.0, "accuracy_norm": 0.0}
    for question in shard.questions:
        own, found = found[: len(question.sequences)], found[len(question.sequences) :]
        sums["accuracy"] += float(np.argmax(own) == question.right)
        sums["accuracy_norm"] += float(np.argmax(own / np.array(question.num_characters)) == question.right)
    return sums


@torch.no_grad()  # not inference_mode: weights that are gathered in it (ZeRO 3) could not be trained later
def log_likelihoods(
    model: Any, sequences: Sequence[Int32], num_given: Sequence[int], batch_size: int, *, pad_token_id: int
) -> np.ndarray:
    """Return the log-likelihood of each sequence after its given tokens: a sum over tokens, float64 (n,)."""
    found = np.empty(len(sequences))
    for start in range(0, len(sequences), batch_size):
        rows = slice(start, start + batch_size)
        found[rows] = _log_likelihoods(model, sequences[rows], num_given[rows], pad_token_id)
    return found


def _log_likelihoods(model: Any, sequences: Sequence[Int32], num_given: Sequence[int], pad_token_id: int) -> np.ndarray:
    """Score one batch. The last token of a sequence is predicted and never read."""
    tokens, present = rectangle(sequences, pad_token_id, left=False)  # (n, longest)
    tokens, present = tokens.to(model.device), present.to(model.device)
    first = min(num_given) - 1  # the first position whose prediction counts for any sequence
    predicted = model(
        input_ids=tokens[:, :-1], attention_mask=present[:, :-1], logits_to_keep=tokens.shape[1] - 1 - first
    ).logits  # (n, longest - 1 - first, vocabulary)
    wide = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    targets = tokens[:, first + 1 :, None]
    each = wide.gather(-1, targets).squeeze(-1) - wide.logsumexp(-1)  # (n, longest - 1 - first)
    positions = torch.arange(first + 1, tokens.shape[1], device=model.device)
    counts = present[:, first + 1 :].bool() & (positions >= torch.tensor(num_given, device=model.device)[:, None])
    return torch.where(counts, each, 0.0).double().sum(-1).cpu().numpy()


def _generated(model: Any, tokenizer: Any, shard: TaskShard, batch_size: int, pad_token_id: int) -> dict[str, float]:
    sums = {"exact_match": 0.0, "rouge_l": 0.0}
    prompts = [question.sequences[0] for question in shard.questions]
    texts = generate(
        model,
        tokenizer,
        prompts,
        batch_size,
        max_new_tokens=shard.task.max_new_tokens,
        stop=shard.task.stop,
        pad_token_id=pad_token_id,
    )
    for question, text in zip(shard.questions, texts, strict=True):
        sums["exact_match"] += max(exact_match(text, reference) for reference in question.references)
        sums["rouge_l"] += max(rouge_l(text, reference) for reference in question.references)
    return sums
