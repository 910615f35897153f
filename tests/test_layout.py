"""The repository's layout (docs/decisions/0001-layout.md): what each of its promises means in practice.

``platform/`` bears the name of a module of the standard library and must never shadow it, and the four rooms must be
one package wherever they run: here, in a wheel, and in a Ray worker that was sent the bare repository.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fedloom

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("platform", "methods", "tuning", "jobs")
STDLIB = Path(sysconfig.get_path("stdlib")).resolve()


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Return what a child prints; it inherits no PYTHONPATH, and what it complains of is shown when it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    child = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, f"{command[0]} ended with {child.returncode}:\n{child.stdout}\n{child.stderr}"
    return child.stdout


def room_files() -> set[str]:
    """Everything that belongs in a wheel, by its name there: code, presets, templates, the built-in model."""
    files = {
        f"fedloom/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return files | {"fedloom/__init__.py", "fedloom/py.typed"}


def test_platform_is_a_namespace_folder():
    """A folder without ``__init__.py`` never shadows a module of the same name (PEP 420)."""
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_the_import_name_holds_four_relative_links():
    """Nothing but ``__init__.py``, the type marker and the links: relative, so that a clone anywhere has them."""
    package = ROOT / "fedloom"
    names = {path.name for path in package.iterdir()} - {"__pycache__"}

    assert {"__init__.py", "py.typed", *ROOMS} == names
    assert {room: f"../{room}" for room in ROOMS} == {room: os.readlink(package / room) for room in ROOMS}
    assert all((package / room).is_dir() for room in ROOMS)


def test_the_version_stands_in_two_places_that_agree():
    """``pyproject.toml`` says what is built, ``fedloom.__version__`` what runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert fedloom.__version__ == project["version"]


def test_the_standard_library_wins_under_pytest():
    """Pytest puts folders of the repository on the path; ``platform`` stays the standard library's."""
    import platform

    assert Path(platform.__file__).resolve() == STDLIB / "platform.py"
    assert platform.system()


@pytest.mark.parametrize("folder", [".", "fedloom", "tests"])
def test_the_standard_library_wins_from(folder):
    """``python -c`` puts the working directory first on the path."""
    code = "import platform; platform.system(); print(platform.__file__)"

    assert Path(run(sys.executable, "-c", code, cwd=ROOT / folder).strip()).resolve() == STDLIB / "platform.py"


def test_tools_start_from_the_root():
    """``python -m`` does so too, and pip needs the real ``platform`` before it can say its version."""
    assert run(sys.executable, "-m", "pip", "--version", cwd=ROOT).startswith("pip ")


@pytest.mark.ray
def test_the_standard_library_wins_in_a_worker_of_this_process(ray_local):
    """A worker inherits the driver's path, the repository's root among it."""
    import ray

    @ray.remote(num_cpus=1)
    def look() -> tuple[str, str]:
        import platform

        return platform.__file__, fedloom.__file__

    platform_file, fedloom_file = ray.get(look.remote())
    assert Path(platform_file).resolve() == STDLIB / "platform.py"
    assert Path(fedloom_file).resolve() == ROOT / "fedloom" / "__init__.py"


DRIVER = """
import importlib.util, json, sys
import ray

assert importlib.util.find_spec("fedloom") is None, "fedloom is importable without the upload; this proves nothing"
excludes = ["/.venv", "/.git", "/fedloom-runs", "/docs", "/tests", "/benchmarks"]
ray.init(
    address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
    runtime_env={"working_dir": sys.argv[1], "excludes": excludes},
)

@ray.remote
def look():
    import platform
    import fedloom, fedloom.platform.errors, fedloom.methods
    return [platform.__file__, platform.system(), fedloom.__file__, fedloom.platform.errors.__file__]

session = ray._private.worker._global_node.get_session_dir_path()
print(json.dumps([session, *ray.get(look.remote())]))
ray.shutdown()
"""


@pytest.mark.ray
def test_a_worker_needs_nothing_but_the_uploaded_repository(tmp_path):
    """``ray job submit --working-dir .`` works on a cluster where Fedloom was never installed.

    The driver is the bare interpreter, with this environment's packages on PYTHONPATH: path files, and with them an
    editable installation, count only in site folders. It asserts itself that it cannot import fedloom.
    """
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    interpreter = Path(sys._base_executable)
    output = run(interpreter, driver, ROOT, cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))

    session, platform_file, system, *fedloom_files = json.loads(output.splitlines()[-1])
    assert Path(platform_file).resolve() == STDLIB / "platform.py"
    assert system
    for file in fedloom_files:
        assert Path(session).resolve() in Path(file).resolve().parents


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Build the wheel of the checkout, the sdist, and the wheel that is made from the sdist. No network is asked."""
    direct, chain = tmp_path_factory.mktemp("direct"), tmp_path_factory.mktemp("chain")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", direct, ROOT, cwd=direct)
    run(*build, "--outdir", chain, ROOT, cwd=chain)
    return next(direct.glob("*.whl")), next(chain.glob("*.tar.gz")), next(chain.glob("*.whl"))


def packaged(wheel: Path) -> set[str]:
    """Return the files of a wheel, less its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_rooms(built):
    """Code and data through the links, and nothing else."""
    wheel, _, _ = built

    assert room_files() == packaged(wheel)


def test_the_sdist_gives_the_same_wheel(built):
    """The links become files in the sdist; the wheel made from it has the same list."""
    wheel, sdist, from_sdist = built

    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive.getmembers() if member.issym()]
    assert packaged(wheel) == packaged(from_sdist)


def test_the_wheel_runs_from_an_empty_folder(built, tmp_path):
    """Installed without the checkout in reach, the command answers and finds its presets."""
    wheel, _, _ = built
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target)
    run(*pip, "--disable-pip-version-check", wheel, cwd=empty)
    installed = {"PYTHONPATH": str(target)}

    where = run(sys.executable, "-c", "import fedloom; print(fedloom.__file__)", cwd=empty, **installed)
    assert target / "fedloom" / "__init__.py" == Path(where.strip())
    assert fedloom.__version__ in run(target / "bin" / "fedloom", "--version", cwd=empty, **installed)
    presets = run(target / "bin" / "fedloom", "presets", cwd=empty, **installed)
    assert all(preset.stem in presets for preset in (ROOT / "jobs" / "presets").glob("*.yaml"))


def test_the_image_is_made_from_files_that_exist():
    """Every COPY finds its source, ``.dockerignore`` lets pass exactly these, and versions agree with the rest."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    first, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copies = re.findall(r"^COPY (.+) \S+$", dockerfile, flags=re.MULTILINE)
    sources = {source for copy in copies for source in copy.split()}
    uv = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)

    assert all((ROOT / source).exists() for source in sources)
    assert first == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == sources
    assert {"fedloom", *ROOMS, "README.md", "LICENSE"} <= sources  # what pyproject.toml builds a wheel from
    assert uv
    assert f"uv=={uv[1]}" in dockerfile
