"""Turn texts into flat arrays of tokens."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedloom.platform.data.federated import Int32, Int64
from fedloom.platform.errors import DataError
from fedloom.platform.experiment_data import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 4096
BATCH_CHARACTERS = 2**21
"""Texts, and characters of them, that go through the tokenizer in one call: it takes up to 150 bytes for each."""
MAX_CHARACTERS = 2**20
"""Of one text, which the tokenizer cannot part."""
Text = str | tuple[str, str]
"""A text, or a pair of texts that the tokenizer joins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokenised examples.

    Attributes:
        input_ids: int32 (num_tokens,).
        offsets: int64 (n + 1,).
        num_silent: int64 (n,): leading tokens that carry no loss; zeros for classification.
    """

    input_ids: Int32
    offsets: Int64
    num_silent: Int64


def pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the padding token, or the end-of-sequence token where a tokenizer has none (GPT-2, Llama)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise DataError("key model.name: its tokenizer has neither a padding nor an end-of-sequence token.")


def check_length(data: DataSection, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a `max_length` that holds no example, or more tokens than the tokenizer says its model can read."""
    if data.task == "causal_lm":
        least, why = 2, "causal_lm predicts a token from those before it"
    else:
        pair = data.columns.text_pair is not None
        least = tokenizer.num_special_tokens_to_add(pair=pair) + 1 + pair
        why = "the tokenizer's special tokens take the rest"
    if data.max_length < least:
        raise DataError(f"key data.max_length: {data.max_length} is too short, {why}; at least {least} is needed.")
    if data.max_length > tokenizer.model_max_length:
        raise DataError(
            f"key data.max_length: {data.max_length} is more than the {tokenizer.model_max_length} tokens that the "
            "model's tokenizer allows."
        )


def tokenize(
    data: DataSection, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], texts: Sequence[str]
) -> Tokens:
    """Tokenise examples, at most `max_length` tokens each.

    classification: the text, or the prompt and the text as a pair, with the tokenizer's special tokens, truncated as
    the tokenizer does: of a pair the longer one first.

    causal_lm: [bos] prompt completion eos; bos only if the tokenizer itself starts texts with it. Prompt and completion
    are tokenised apart, so that no token spans the boundary. Where both are long, each gets half of `max_length`, and
    what one does not use goes to the other; the prompt loses its beginning, the completion its end.
    """
    if data.task == "classification":
        whole: Sequence[Text] = texts if data.columns.text_pair is None else list(zip(prompts, texts, strict=True))
        ids = encode(tokenizer, whole, truncation=True, max_length=data.max_length)
        return _flat(ids, [0] * len(ids))
    if tokenizer.eos_token_id is None:
        raise DataError("key model.name: its tokenizer has no end-of-sequence token, which causal_lm needs.")
    start = start_tokens(tokenizer)
    left = encode(tokenizer, prompts, add_special_tokens=False)
    right = encode(tokenizer, texts, add_special_tokens=False)
    ids, num_silent = [], []
    for prompt, completion in zip(left, right, strict=True):
        learnt = [*completion, tokenizer.eos_token_id]
        half = (data.max_length + 1) // 2
        learnt = learnt[: max(data.max_length - len(start) - len(prompt), half)]
        room = data.max_length - len(start) - len(learnt)
        given = [*start, *prompt[max(len(prompt) - room, 0) :]]
        ids.append(given + learnt)
        num_silent.append(0 if data.train_on_prompt else len(given))
    return _flat(ids, num_silent)


def first_without_loss(tokens: Tokens, task: str) -> int | None:
    """Find the first example that has no token, or in causal_lm none to predict; None if there is no such example."""
    lengths = np.diff(tokens.offsets)
    # A causal model predicts every token from those before it, so that the first one never carries loss.
    silent = np.maximum(tokens.num_silent, 1) if task == "causal_lm" else tokens.num_silent
    found = np.flatnonzero(lengths <= silent)
    return int(found[0]) if len(found) else None


def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return what the tokenizer puts before every text, if that is its bos token."""
    ids = tokenizer("")["input_ids"][:1]
    return [int(token_id) for token_id in ids if token_id == tokenizer.bos_token_id]


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Text], **options: int | bool) -> list[list[int]]:
    """Tokenise texts, as many at once as the bounds allow; ``options`` are the tokenizer's."""
    ids: list[list[int]] = []
    for batch in _batches(texts):
        encoded = tokenizer(batch, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
        ids.extend(encoded["input_ids"])
    return ids


def _batches(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """Yield texts in their order, as many at once as the bounds allow, at least one."""
    batch: list[Text] = []
    characters = 0
    for text in texts:
        length = len(text) if isinstance(text, str) else sum(map(len, text))
        if batch and (len(batch) == BATCH or characters + length > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += length
    if batch:
        yield batch


def _flat(ids: Sequence[Sequence[int]], num_silent: Sequence[int]) -> Tokens:
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Tokens(
        input_ids=np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=int(offsets[-1])),
        offsets=offsets,
        num_silent=np.array(num_silent, np.int64),
    )
