"""`builtin:stdlib`: the documentation of the running Python's standard library, as federated data.

Every module (a package counts once) is one natural client, the eight areas of `areas.py` are the labels, and an
example is in the test split if the hash of its name says so.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from fedloom.platform.builtin.areas import AREA_OF
from fedloom.platform.builtin.docstrings import Docstring, docstrings, help_topics

TEST_SHARE = 0.2
"""Share of names that fall into the test split."""

MIN_WORDS = 3
"""A docstring of fewer words says nothing about what it documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StdlibExample:
    """One example of `builtin:stdlib`, for both kinds of task.

    `classification` reads `text` (one line, no signature) and predicts `label`. `causal_lm` reads `prompt` (the
    signature) and writes `completion` (the docstring). `client` is the module, `split` is "train" or "test".
    """

    text: str
    label: str
    prompt: str
    completion: str
    client: str
    split: str


def split_of(name: str) -> str:
    """Return "train" or "test" for a qualified name: the same on every machine and in every version of Python."""
    return "test" if _rank(name) < TEST_SHARE * 2**64 else "train"


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def stdlib_examples() -> list[StdlibExample]:
    """Every example of `builtin:stdlib`, sorted by qualified name; takes about two seconds, once per process.

    Of docstrings with the same words only the one whose name hashes lowest stays. Names with low hashes are the test
    split, so a text that stands under several names is a test text if any of these names is.
    """
    return list(_examples())


@functools.cache
def _examples() -> tuple[StdlibExample, ...]:
    kept: dict[str, Docstring] = {}
    for docstring in docstrings():
        if len(docstring.text.split()) < MIN_WORDS:
            continue
        words = docstring.words
        if words not in kept or _rank(docstring.name) < _rank(kept[words].name):
            kept[words] = docstring
    return tuple(
        StdlibExample(
            text=words,
            label=AREA_OF[docstring.module],
            prompt=docstring.prompt,
            completion=docstring.text,
            client=docstring.module,
            split=split_of(docstring.name),
        )
        for words, docstring in sorted(kept.items(), key=lambda item: (item[1].name, item[0]))
    )


def fingerprint(examples: Sequence[StdlibExample]) -> str:
    """Sixteen hexadecimal digits that name the content: it differs among versions of Python."""
    digest = hashlib.sha256()
    for example in sorted(map(astuple, examples)):
        digest.update(json.dumps(example).encode() + b"\n")
    return digest.hexdigest()[:16]


def pretraining_texts() -> list[str]:
    """Collect what `builtin:tiny` reads: docstrings in the order of the sources, then the topics of `help()`.

    A docstring is left out if its words are those of a test example, or if its own name is in the test split.
    """
    unseen = {example.text for example in stdlib_examples() if example.split == "test"}
    texts: dict[str, str] = {}
    for docstring in docstrings():
        words = docstring.words
        if words not in unseen and split_of(docstring.name) == "train":
            texts.setdefault(words, docstring.text)
    return [*texts.values(), *help_topics().values()]
