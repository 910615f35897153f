"""The documents as a reader sees them: fenced blocks, and the command lines in blocks and in running text."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "docker" / "README.md"]
SHELLS = ("sh", "bash", "console")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of code: where it stands, what it is said to be, and what it holds."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Return where it is, for a reader of the tests."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def _tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8"))


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document in order. Indented ones are formulas and trees, which nobody types."""
    return [
        Block(document=document, line=token.map[0] + 1, language=token.info.strip(), text=token.content)
        for token in _tokens(document)
        if token.type == "fence"
    ]


def indented(document: Path) -> list[str]:
    """Return the lines of the blocks of a document that are set off by spaces."""
    return [line for token in _tokens(document) if token.type == "code_block" for line in token.content.splitlines()]


def every_block(*languages: str) -> list[Block]:
    """Return the blocks of all documents in one of these languages."""
    return [block for document in DOCUMENTS for block in blocks(document) if block.language in languages]


def spans(document: Path) -> list[str]:
    """Return what stands between backticks in running text."""
    children = [child for token in _tokens(document) for child in token.children or ()]
    return [child.content for child in children if child.type == "code_inline"]


def commands(text: str) -> list[list[str]]:
    """Return the commands of a shell block as words, without comments, assignments in front and redirected output."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines]
    bare = [words[_assignments(words) : words.index(">") if ">" in words else None] for words in split]
    return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in bare if words]


def _assignments(words: list[str]) -> int:
    """Return how many words in front set a variable for the command alone."""
    return next((place for place, word in enumerate(words) if not re.match(r"[A-Za-z_]\w*=", word)), len(words))
