"""The rooms depend on each other in one direction: jobs -> tuning -> methods -> platform.

The source is parsed, not run, so that imports inside functions count as well.
"""

import ast
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("platform", "methods", "tuning", "jobs")  # each may import those before it, and itself
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
# What shows through a declared package, as the errors that it lets out or the loggers that it writes to.
SHOWS_THROUGH = {
    "pydantic_core": "pydantic",
    "huggingface_hub": "datasets",
    "sqlalchemy": "mlflow",
    "requests": "mlflow",
}
OTHER_CODE = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of every import of a file, relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    """A room imports itself and the rooms below it, and never a room above."""
    room = path.relative_to(ROOT).parts[0]
    above = {f"fedloom.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
    wrong = [(line, name) for line, name in imported(path) if ".".join(name.split(".")[:2]) in above]

    assert not wrong


@pytest.mark.parametrize("path", MODULES + OTHER_CODE, ids=name_of)
def test_imports_are_absolute_and_go_through_the_package(path):
    """``import methods`` would work from the root alone, and would load every module twice."""
    ours = {f"platform.{entry.stem}" for entry in (ROOT / "platform").iterdir()}  # plain `platform` is not
    wrong = [
        (line, name)
        for line, name in imported(path)
        if name.split(".")[0] in {"", "methods", "tuning", "jobs"} or ".".join(name.split(".")[:2]) in ours
    ]

    assert not wrong


@pytest.mark.parametrize("path", [path for path in MODULES if not re.match(r"_(?!_init__)", path.name)], ids=name_of)
def test_a_module_says_what_it_is(path):
    """Every public module has a docstring."""
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_nothing_at_the_root_shadows_the_standard_library():
    """From the root, only ``platform`` has a standard name, and it has no code of its own at its top."""
    names = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}

    assert {"platform"} == names & sys.stdlib_module_names
    assert Path(sysconfig.get_path("stdlib")).resolve() in Path(sys.modules["platform"].__file__).resolve().parents


def test_the_platform_names_no_method():
    """The runtime asks the registry: no string in it is the path of a method's module."""
    wrong = [
        (name_of(path), node.lineno, node.value)
        for path in MODULES
        if path.is_relative_to(ROOT / "platform")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "fedloom.methods." in node.value
    ]

    assert not wrong


def test_methods_are_pure():
    """A method knows no Ray, no tracker and no files: it could run anywhere."""
    refused = {"ray", "mlflow", "peft", "transformers", "datasets", "os", "pathlib", "subprocess", "shutil", "tempfile"}
    wrong = [
        (name_of(path), line, name)
        for path in MODULES
        if path.is_relative_to(ROOT / "methods")
        for line, name in imported(path)
        if name.split(".")[0] in refused
    ]

    assert not wrong


def test_nothing_is_unpickled():
    """Data that cross a trust boundary are safetensors and JSON: no room imports a module that runs what it reads."""
    refused = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "np.load", "numpy.load", "pandas.read_pickle", "eval", "exec", "yaml.unsafe_load"}
    trees = {path: ast.parse(path.read_text()) for path in MODULES}
    imports = [
        (name_of(path), line, name)
        for path in MODULES
        for line, name in imported(path)
        if refused & set(name.split("."))
    ]
    called = [
        (name_of(path), node.lineno, ast.unparse(node.func))
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
    ]
    trusting = [
        (name_of(path), node.value.lineno)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword)
        and node.arg in {"allow_pickle", "trust_remote_code"}
        and getattr(node.value, "value", None) is not False
    ]

    assert not imports
    assert not called
    assert not trusting


def test_what_is_imported_is_declared_and_explained():
    """No room leans on a package that only a dependency of a dependency brings; each has its row in the docs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    required, optional = (
        {re.split(r"[\[<>=]", line)[0] for line in lines} for lines in (project["dependencies"], extras)
    )
    declared = required | optional
    packages = packages_distributions()
    names = {name.split(".")[0] for path in MODULES for _, name in imported(path)}
    foreign = names - sys.stdlib_module_names - {"fedloom", *SHOWS_THROUGH}
    known = {name: {found.lower().replace("_", "-") for found in packages.get(name, [name])} for name in foreign}
    brought = {name: " ".join(requires(owner) or []).lower().replace("-", "_") for name, owner in SHOWS_THROUGH.items()}
    table = (ROOT / "docs" / "dependencies.md").read_text()

    assert not {name: found for name, found in known.items() if not found & declared}
    assert declared >= set(SHOWS_THROUGH.values())
    assert all(name in text for name, text in brought.items())
    assert not {name for name in required if f"| {name} |" not in table}
    assert not {name for name in optional if name not in table}
