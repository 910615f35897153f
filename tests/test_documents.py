"""What the documents tell a reader to type is what the programs take, without running any of it."""

import argparse
import importlib.util
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from documents import DOCUMENTS, ROOT, SHELLS, blocks, commands, every_block, indented, spans

from fedloom.jobs.main import app
from fedloom.jobs.presets import experiment_path
from fedloom.platform.experiment_file import load_experiment, validated
from fedloom.tuning.comparison.reference import read_reference
from fedloom.tuning.sweep_file import Sweep

COMMANDS = typer.main.get_command(app).commands
LANGUAGES = {*SHELLS, "yaml", "python", "text", "{toctree}"}
KNOWN_SPAN = re.compile(r"(\.venv/bin/)?(fedloom|make|python|bash) [^…]+")


def test_nothing_stands_in_an_indented_block():
    """It would be looked at by nobody: commands and formulas are fenced."""
    assert not [(document.name, line) for document in DOCUMENTS for line in indented(document)]


def test_every_block_says_what_it_is():
    """So that each is looked at below. What is neither typed nor read by a program is ``text``."""
    fenced = [block for document in DOCUMENTS for block in blocks(document)]

    assert not [f"{block.place}: {block.language!r}" for block in fenced if block.language not in LANGUAGES]


class ParsedError(Exception):
    """A program has read its arguments; nothing else of it is run."""


def check_make(words):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


def check_fedloom(words):
    name, *arguments = words
    if name != "--version":
        return COMMANDS[name].make_context(name, arguments)
    return None


def _module(name):
    return ROOT / f"{name.replace('.', '/')}.py"


def check_python(words, monkeypatch):
    """A module or a file that exists; its own parser reads the arguments, and then it is left."""
    if words[:1] == ["-m"]:
        name, arguments = words[1], words[2:]
        if name == "pytest":
            assert all(list(ROOT.glob(word)) for word in arguments if word.startswith("tests/"))
            return
        file = _module(name)
    else:
        file, arguments = ROOT / words[0], words[1:]
        name = file.stem
        assert file.parent == ROOT / "tests"
    assert file.is_file()
    if "argparse" not in file.read_text():
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser, *given):
        parse(parser, *given)
        raise ParsedError

    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    with pytest.raises(ParsedError):
        importlib.import_module(name).main()


def check_pip(words):
    """An extra of ours that is asked for is in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"fedloom\[([\w-]+)\]", " ".join(words))
    assert set(extras) <= project["optional-dependencies"].keys()


def check_ray(words):
    """Ray's own parser reads the arguments."""
    name, *arguments = words
    importlib.import_module("ray.scripts.scripts").cli.commands[name].make_context(name, arguments)


def check_mlflow(words):
    """MLflow's command line takes seconds to import; its source names each option."""
    package = Path(importlib.util.find_spec("mlflow").origin).parent
    sources = [*(package / "cli").glob("*.py"), package / "utils" / "cli_args.py"]
    known = re.findall(r'"(--[a-z-]+)"', "".join(source.read_text() for source in sources))
    assert {word for word in words if word.startswith("--")} <= set(known)


def check_files(words):
    """Files that a program of somebody else's reads are there; a command of ours in it parses."""
    for flag, file in itertools.pairwise(words):
        assert flag != "-f" or (ROOT / file).is_file()
    if "run" in words and "fedloom" in words:
        check_fedloom(words[words.index("fedloom") + 1 :])


CHECKS = {
    "make": check_make,
    "fedloom": check_fedloom,
    "pip": check_pip,
    "ray": check_ray,
    "mlflow": check_mlflow,
    "docker": check_files,
    "kubectl": check_files,
    "bash": lambda words: check_files(["-f", *words]),
    "export": len,
    ".": len,
}


def check(words, monkeypatch):
    """Check one command line; a program without a line here is a mistake until somebody says how to check it."""
    program, *rest = words
    if program == "python":
        check_python(rest, monkeypatch)
    else:
        CHECKS[program](rest)


@pytest.mark.parametrize("block", every_block(*SHELLS), ids=lambda block: block.place)
def test_every_line_of_a_shell_block_is_taken(block, monkeypatch):
    """The program exists, and so do its commands, options, targets, modules and files."""
    for words in commands(block.text):
        check(words, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_commands_in_running_text_exist(document, monkeypatch):
    """Between backticks a command may leave out values: targets, modules, commands and options exist all the same."""
    for text in filter(KNOWN_SPAN.fullmatch, spans(document)):
        ((program, *words),) = commands(text)
        if program == "fedloom":
            given = {word for word in words if word.startswith("--")}
            assert given <= {option for parameter in COMMANDS[words[0]].params for option in _options(parameter)}, text
        elif program == "python" and words[0] == "-m" and len(words) == 2:
            assert _module(words[1]).is_file(), text
        elif words[0] != "-c":
            check([program, *words], monkeypatch)


def _options(parameter):
    return (*parameter.opts, *parameter.secondary_opts)


NAMED = [
    pytest.param(block, words, id=f"{block.place}: {shlex.join(words)}")
    for block in every_block(*SHELLS)
    for words in commands(block.text)
    if words[:2] in (["fedloom", "run"], ["fedloom", "plan"], ["fedloom", "submit"], ["fedloom", "tune-rank"])
]


@pytest.mark.parametrize(("block", "words"), NAMED)
def test_an_experiment_that_a_command_names_is_valid_with_its_overrides(block, words, tmp_path, monkeypatch):
    """The first YAML block of the same document stands for a file that the reader is to write."""
    parameters = check_fedloom(words[1:]).params
    given = parameters.get("experiment") or parameters.get("file")
    if given is None:
        return  # a run is resumed
    monkeypatch.chdir(tmp_path)
    experiments = [each.text for each in blocks(block.document) if each.language == "yaml"]
    if given.endswith(".yaml"):
        Path(given).write_text(experiments[0] if experiments else "")
    assert load_experiment(experiment_path(given), parameters["overrides"] or [])


@pytest.mark.parametrize("block", every_block("yaml"), ids=lambda block: block.place)
def test_an_experiment_or_a_sweep_is_valid(block, tmp_path):
    """What a reader copies into a file is accepted: an experiment, whole or as a part, a sweep, published numbers."""
    document = yaml.safe_load(block.text)
    if document.keys() & {"space", "objectives"}:
        assert Sweep.model_validate({"name": "part", "space": {"seed": [0]}} | document)
    elif "published" in document:
        (tmp_path / "numbers.yaml").write_text(block.text)
        assert read_reference(tmp_path / "numbers.yaml")
    else:
        assert validated(document, place="document")


@pytest.mark.parametrize("block", every_block("python"), ids=lambda block: block.place)
def test_python_compiles(block):
    compile(block.text, block.place, "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    """A relative link is a file of the repository."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]

    assert not [link for link in local if not (document.parent / link).exists()]
