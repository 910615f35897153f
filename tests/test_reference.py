"""The reference pages are what the schema and the program say."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from fedloom.jobs.reference import pages, sections_in
from fedloom.platform.experiment import Experiment
from fedloom.tuning.sweep_file import Sweep

FOLDER = Path(__file__).parents[1] / "docs" / "reference"


def sections(root: type[BaseModel]) -> set[type[BaseModel]]:
    """Return a schema's sections, the root among them."""
    return {root}.union(*(sections(part) for key in root.model_fields for part in sections_in(root, key)))


@pytest.mark.parametrize("name", pages())
def test_the_committed_page_is_the_one_that_is_written(name):
    """After ``python -m fedloom.jobs.reference docs/reference`` nothing differs: somebody forgot it otherwise."""
    assert (FOLDER / name).read_text(encoding="utf-8") == pages()[name]


@pytest.mark.parametrize("root", [Experiment, Sweep])
def test_every_key_says_what_it_means(root):
    """Itself, or as a section of its own."""
    silent = [
        (part.__name__, key)
        for part in sections(root)
        for key, field in part.model_fields.items()
        if not field.description and not sections_in(part, key)
    ]

    assert not silent


def test_every_key_of_the_schema_has_a_row():
    """As many rows as the schema has keys: no section is forgotten or told twice."""
    page = pages()["configuration.md"].partition("## Options of methods")[0]
    wanted = sum(len(part.model_fields) for root in (Experiment, Sweep) for part in sections(root))

    assert page.count("\n| `") == wanted
