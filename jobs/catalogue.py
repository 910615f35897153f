"""What every method is, told once in its class and shown on the terminal and in ``docs/methods``.

``python -m fedloom.jobs.catalogue docs/methods`` writes the blocks of facts into the pages, and the list of all methods
into their ``README.md``. A block stands between two comments; the rest of a page is written by hand.
"""

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedloom.platform.errors import FedloomError
from fedloom.platform.registry import method_class, method_names

BEGIN = "<!-- facts: written by python -m fedloom.jobs.catalogue docs/methods -->"
END = "<!-- end of facts -->"
LISTED = {  # of a method's facts, by what they are called in the list
    "exact mean of the products B A": "exact mean",
    "down": "down",
    "up": "up",
    "a round adds to the patch": "to the patch",
    "server": "server",
}
SYMBOLS = (
    "In the formulas r is the server's rank, r_k a client's, P = P_B + P_A the numbers in one direction of all "
    "modules, P_B those of B and P_A those of A, P_min those of the narrower of the two in each module, M the number "
    "of modules, H the numbers in the head, t the number of finished rounds, S the numbers in what a client has "
    "chosen, K the number of clients in a round and R the sum of their ranks. Values are float32."
)


def year_of(paper: str) -> int:
    """Return the year of an arXiv id."""
    return 2000 + int(paper.removeprefix("arXiv:")[:2])


def facts(name: str) -> dict[str, str]:
    """Return what a method is, by the words that users read."""
    traits = method_class(name).traits
    table = {
        "method": traits.title,
        "name in experiments": name,
        "paper": f"{traits.paper} ({year_of(traits.paper)})",
        "unequal ranks": "yes" if traits.heterogeneous else "no",
        "exact mean of the products B A": traits.exact,
        "down": f"{traits.down}: {traits.bytes_down} bytes",
        "up": f"{traits.up}: {traits.bytes_up} bytes",
        "a client keeps": traits.memory,
        "a round adds to the patch": f"a piece per module, rank {traits.patch}: 4 rank P bytes",
        "server": f"operations a round: {traits.server}",
    }
    there = {"a client keeps": traits.memory, "a round adds to the patch": traits.patch}
    broken = {f"law `{law}`": f"does not hold: {reason}" for law, reason in traits.exceptions.items()}
    return {word: fact for word, fact in table.items() if there.get(word, True)} | broken


def options(name: str) -> list[tuple[str, str, str]]:
    """Return name, default and meaning of a method's options; meanings come from the docstring of its class."""
    kind: Any = method_class(name)
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, flags=re.MULTILINE))
    return [
        (field.name, str(field.default), " ".join(meanings.get(field.name, "").replace("``", "").split()))
        for field in dataclasses.fields(kind)
    ]


def overview() -> Group:
    """Return the list of all methods: a paragraph for each, which fits any terminal, and what the symbols mean."""
    parts: list[Any] = []
    for name in method_names():
        traits = method_class(name).traits
        ranks = "unequal ranks" if traits.heterogeneous else "equal ranks"
        known = facts(name)
        lines = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        lines.add_column(no_wrap=True)
        for word, short in LISTED.items():
            if word in known:
                lines.add_row(short, Text(known[word]))
        title = Text(f", {traits.title}, {known['paper']}, {ranks}")
        parts += [Text.assemble((name, "bold"), title), Padding(lines, (0, 0, 1, 4))]
    return Group(*parts, Text(SYMBOLS))


def page(name: str) -> Group:
    """Return one method's page: facts, options, and the mathematics as its module tells it.

    Raises:
        ExperimentError: no method has that name.
    """
    known = Table(show_header=False, box=None)
    for word, fact in facts(name).items():
        known.add_row(word, Text(fact))
    chosen = Table("option", "default", "meaning")
    for option in options(name):
        chosen.add_row(*(Text(part) for part in option))
    module = importlib.import_module(method_class(name).__module__)
    parts: list[Any] = [known, "", Text(inspect.getdoc(module) or "", no_wrap=True, overflow="ignore"), ""]
    return Group(*parts, *([chosen] if chosen.row_count else ["No options."]))


def show(name: str | None) -> None:
    """Print the table of all methods, or one method's page."""
    Console().print(overview() if name is None else page(name))


def block(name: str) -> str:
    """Return the facts of a method as a table in Markdown, between the two comments."""
    rows = "\n".join(f"| {word} | {fact} |" for word, fact in facts(name).items())
    return f"{BEGIN}\n\n| | |\n|---|---|\n{rows}\n\n{END}"


def listing() -> str:
    """Return the list of all methods as a table in Markdown, between the two comments."""
    heads = ("name", "method", "paper", "unequal ranks", "exact mean of the products", "down", "up", "server")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in method_names():
        traits, known = method_class(name).traits, facts(name)
        cells = (f"`{name}`", f"[{traits.title}]({name}.md)", known["paper"], known["unequal ranks"], traits.exact)
        rows.append(f"| {' | '.join([*cells, known['down'], known['up'], traits.server])} |")
    return "\n".join([BEGIN, "", SYMBOLS, "", *rows, "", END])


def pages(folder: Path) -> dict[Path, str]:
    """Return the text that every page has to have: by hand around the comments, generated between them.

    Raises:
        FedloomError: a page is not there, or has no such comments.
    """
    wanted = {folder / "README.md": listing()} | {folder / f"{name}.md": block(name) for name in method_names()}
    return {path: _replaced(path, generated) for path, generated in wanted.items()}


def _replaced(path: Path, generated: str) -> str:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise FedloomError(f"page {path} needs the lines {BEGIN!r} and {END!r}, between which the facts are written")
    return before + generated + after


if __name__ == "__main__":
    for path, text in pages(Path(sys.argv[1])).items():
        path.write_text(text, encoding="utf-8")
