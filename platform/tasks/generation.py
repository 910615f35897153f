"""Greedy generation in batches, and what a generated text is worth beside a reference.

Rouge-L: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries (ACL Workshop on Text Summarization).
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.platform.base_model import quiet_transformers
from fedloom.platform.data.federated import Int32

WORD = re.compile(r"[^\W_]+")


@torch.no_grad()  # not inference_mode: weights that are gathered in it (ZeRO 3) could not be trained later
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Int32],
    batch_size: int,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    pad_token_id: int,
) -> list[str]:
    """Continue prompts, always with the likeliest token, and return what is new, without special tokens.

    A text ends before the first of the strings in ``stop``, at the tokenizer's end-of-sequence token, or after
    ``max_new_tokens``. What the checkpoint would have of generation (sampling, penalties) is left aside.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    # Values that are not given here would be taken from the model's own configuration.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id,
    )
    texts = []
    for start in range(0, len(prompts), batch_size):
        tokens, present = rectangle(prompts[start : start + batch_size], pad_token_id, left=True)
        length = tokens.shape[1]
        stopped = StoppingCriteriaList([_Stopped(tokenizer, length, stop)] if stop else [])
        with quiet_transformers():
            found = model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=present.to(model.device),
                stopping_criteria=stopped,
            )
        texts += [_text(tokenizer, row, stop) for row in found[:, length:].tolist()]
    return texts


def rectangle(sequences: Sequence[Int32], pad_token_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return sequences padded on one side: tokens and where there are any, int64 (n, longest)."""
    longest = max(map(len, sequences))
    tokens = np.full((len(sequences), longest), pad_token_id, np.int64)
    present = np.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), None) if left else slice(len(sequence))
        tokens[row, where], present[row, where] = sequence, 1
    return torch.from_numpy(tokens), torch.from_numpy(present)


class _Stopped:
    """Ends the rows whose new text holds a stop string; transformers asks no more of a criterion than to be called.

    The text is looked at, not the tokens: the string may begin and end within tokens, and the prompt does not count.
    """

    def __init__(self, tokenizer: Any, length: int, stop: Sequence[str]) -> None:
        self._tokenizer, self._length, self._stop = tokenizer, length, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._length :], skip_special_tokens=True)
        held = [any(string in text for string in self._stop) for text in texts]
        return torch.tensor(held, device=input_ids.device)


def _text(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> str:
    """Return the text of new tokens up to the end-of-sequence token or the first stop string."""
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def exact_match(text: str, reference: str) -> bool:
    """Whether two texts are the same but for case, white space and full stops at the end."""
    return _normal(text) == _normal(reference)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(". ")


def rouge_l(text: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words, between 0 and 1.

    Words are lower-case runs of letters and digits, without stemming. For ASCII texts they are those of the
    ``rouge-score`` package, which knows no other letters.
    """
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """What ``rouge-score`` asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())
