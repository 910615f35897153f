"""The text that `builtin:tiny` reads: what is held out, the tokenizer, and the stream of tokens."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fedloom.platform.builtin.stdlib_docs import pretraining_texts

VOCABULARY = 2048
PAD, END = "<|pad|>", "<|end|>"
HELD_OUT_SHARE = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in the order of the library, so that neighbours speak of the same things.

    `held_out` are about four in a hundred documents, chosen by the hash of their text: they serve to stop in time.
    They are not the test split of `builtin:stdlib`, which is in neither part. `python` is the version documented.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    python: str

    @classmethod
    def of(cls, texts: Sequence[str], *, python: str) -> "Corpus":
        """Split the texts."""
        held_out = {text for text in texts if _rank(text) < HELD_OUT_SHARE * 2**64}
        return cls(
            train=tuple(text for text in texts if text not in held_out),
            held_out=tuple(text for text in texts if text in held_out),
            python=python,
        )

    @classmethod
    def load(cls, path: Path | None = None) -> "Corpus":
        """Take the texts of a file that `write_texts` wrote, or those of the running Python."""
        if path is None:
            return cls.of(pretraining_texts(), python=platform.python_version())
        written = json.loads(path.read_text(encoding="utf-8"))
        return cls.of(written["texts"], python=written["python"])

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name the texts and their order."""
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()[:16]


def write_texts(path: Path) -> int:
    """Write the running Python's texts as JSON, to be trained on elsewhere, and return their number."""
    texts = pretraining_texts()
    path.write_text(json.dumps({"python": platform.python_version(), "texts": texts}), encoding="utf-8")
    return len(texts)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE of `VOCABULARY` entries: every text has an encoding, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return ending_texts(tokenizer)


def ending_texts(tokenizer: Tokenizer) -> Tokenizer:
    """Let the tokenizer close a text with `END`, where a classifier reads it off: all of the text is behind it."""
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """All texts in one row, each followed by `END`.  Shape (tokens,), dtype int64."""
    return torch.tensor([token for encoding in tokenizer.encode_batch(list(texts)) for token in encoding.ids])


def _rank(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
