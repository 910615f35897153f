"""What the documents tell a reader to type works: make targets, commands, experiments, and links."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from fedloom.jobs.demo import BASELINE, METHODS
from fedloom.jobs.main import app
from fedloom.jobs.presets import experiment_path
from fedloom.platform.experiment_file import load_experiment, validated
from fedloom.platform.registry import method_class, method_names
from fedloom.tuning.sweep_file import Sweep

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "docker" / "README.md"]
COMMANDS = typer.main.get_command(app).commands


def blocks(document: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a document: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines_starting_with(program: str) -> list:
    """Return every command line for a program in the documents' blocks, with the document it stands in."""
    return [
        pytest.param(document, line, id=f"{document.name}: {line}")
        for document in DOCUMENTS
        for language, block in blocks(document)
        if language in ("", "sh", "bash", "console")
        for line in (raw.strip().removeprefix("$ ").split(" #")[0].strip() for raw in block.splitlines())
        if line.split(" ")[0].removeprefix(".venv/bin/") == program
    ]


@pytest.mark.parametrize(("document", "line"), lines_starting_with("make"))
def test_a_make_target_exists(document, line):
    """Every target that a document names is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    assert {word for word in shlex.split(line)[1:] if "=" not in word} <= targets


@pytest.mark.parametrize(("document", "line"), lines_starting_with("fedloom"))
def test_a_command_parses(document, line, tmp_path, monkeypatch):
    """The command exists and takes these options; an experiment that it names is valid with these overrides.

    The YAML block of the same document stands for a file that the reader is to write.
    """
    name, *arguments = shlex.split(line)[1:]
    context = COMMANDS[name].make_context(name, arguments)

    if name == "run":
        monkeypatch.chdir(tmp_path)
        experiments = [block for language, block in blocks(document) if language == "yaml"]
        given = context.params["experiment"]
        if given.endswith(".yaml"):
            Path(given).write_text(experiments[0] if experiments else "")
        assert load_experiment(experiment_path(given), context.params["overrides"] or [])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(block, id=f"{document.name}: {block.splitlines()[0]}")
        for document in DOCUMENTS
        for language, block in blocks(document)
        if language == "yaml"
    ],
)
def test_an_experiment_or_a_sweep_is_valid(text):
    """What a reader copies into a file is accepted, as a whole or as a part that is merged with the defaults."""
    document = yaml.safe_load(text)
    if document.keys() & {"space", "objectives"}:
        assert Sweep.model_validate({"name": "part", "space": {"seed": [0]}} | document)
    else:
        assert validated(document, place="document")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    """A relative link is a file of the repository."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]

    assert not [link for link in local if not (document.parent / link).exists()]


def test_the_readme_shows_the_methods_of_the_demo():
    """Each stands there with its name in experiments and its paper; unequal ranks as it says."""
    text = (ROOT / "README.md").read_text()
    for name in METHODS:
        traits = method_class(name).traits
        row = re.search(rf"^\| .* \| `{name}` \| (\S+) \| (\w+) \|", text, flags=re.MULTILINE)
        assert row is not None
        assert row.groups() == (traits.paper, "yes" if traits.heterogeneous else "no")
    assert f"`{BASELINE}`" in text


def test_the_list_of_methods_is_complete():
    """Each registered method stands in the list with its name in experiments and its paper."""
    text = (ROOT / "docs" / "methods" / "README.md").read_text()
    for name in method_names():
        row = re.search(rf"^\| `{name}` \| .*$", text, flags=re.MULTILINE)
        assert row is not None, name
        assert method_class(name).traits.paper in row.group(), name


def test_the_readme_shows_folders_that_exist():
    """The short tree is the repository's."""
    trees = [block for language, block in blocks(ROOT / "README.md") if language == "text" and "platform/" in block]
    folders = re.findall(r"^(\w+/)", trees[0], flags=re.MULTILINE)

    assert folders
    assert not [folder for folder in folders if not (ROOT / folder).is_dir()]
