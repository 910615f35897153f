"""Whatever an experiment file or ``--set`` holds: an experiment or an error of ours, in bounded memory."""

import os
import random
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import outcome, peak_bytes, peak_resident_bytes, refused, tries
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedloom.jobs.presets import experiment_path, preset_titles
from fedloom.platform.bounded_yaml import MAX_DEPTH, MAX_TEXT_BYTES, MAX_VALUES
from fedloom.platform.errors import FedloomError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import experiment_yaml, load_experiment
from fedloom.platform.experiment_world import LARGEST_COUNT
from fedloom.platform.reading import read_bounded
from fedloom.platform.registry import method_class, method_names

PRESETS = {name: experiment_path(name).read_text() for name in preset_titles()}
BASE = "seed: 1\npopulation: {profiles: [{name: a, share: 1}]}\n"
HOSTILE = [
    *("", "~", ".nan", ".inf", "-.inf", "-0.0", "1e999", "1e308", "5e-324", "-1", "true", "2001-01-01", "2001-13-45"),
    *("1" + "0" * 30, "9" * 5000, "0x" + "f" * 4000, "1:" * 200 + "1", "1:" * 200 + "1.5", "0b1", "0o8", "1_0"),
    *("[", "]", "{", "}", "[[[[]]]]", "[" * 50 + "]" * 50, "{a: {a: {a: 1}}}", "&a [*a]", "*a", "<<", "? [1] : 2"),
    *("!!int x", "!!int ''", "!!bool x", "!!null x", "!!timestamp x", "!!float ''", "!!set {a}", "!!omap [a: 1]"),
    *("!!binary aGk=", "!!binary '%'", "!!python/none x", "!!map [1]", "!x y", "\0", '"\\ud800"', "\u2028", "x" * 3000),
]
VALUES = st.sampled_from(HOSTILE) | st.text(max_size=20)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.yaml"


def read(path: Path, content: bytes | str, overrides: list[str] | None = None) -> Any:
    """Return an experiment or an error of ours; an experiment has a hash and reads back as itself."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    before = sorted(path.parent.iterdir())
    found = outcome(lambda: load_experiment(path, overrides or []))
    assert sorted(path.parent.iterdir()) == before
    if isinstance(found, Experiment):
        assert len(found.hash) == 12
        path.write_text(experiment_yaml(found), encoding="utf-8")
        assert load_experiment(path) == found
    return found


@tries(150)
@given(content=st.binary(max_size=200))
def test_any_bytes(place, content):
    read(place, content)


@tries(200)
@given(name=st.sampled_from(sorted(PRESETS)), seed=st.integers(0, 2**32), value=VALUES)
def test_a_preset_with_one_line_spoilt(place, name, seed, value):
    """A value replaced, a line doubled, moved or cut: what a slip of the hand makes of a good file."""
    draws = random.Random(seed)
    lines = PRESETS[name].splitlines()
    index = draws.randrange(len(lines))
    line = lines[index]
    key = line.partition(":")[0]
    lines[index] = draws.choice([f"{key}: {value}", f"{line}\n{line}", line[: len(line) // 2], f" {line}", value])
    read(place, "\n".join(lines))


@tries(200)
@given(name=st.sampled_from(sorted(PRESETS)), cut=st.integers(0, 1200), size=st.integers(0, 9), junk=VALUES)
def test_a_preset_with_bytes_replaced(place, name, cut, size, junk):
    content = PRESETS[name].encode()
    read(place, content[:cut] + junk.encode("utf-8", "surrogatepass") + content[cut + size :])


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of the schema that ends in a value, with the types that it may have."""
    for name, field in model.model_fields.items():
        parts = list(inner_types(field.annotation))
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        listed = any(typing.get_origin(part) is tuple for part in parts)
        for section in sections:
            yield from keys_of(section, f"{prefix}{name}.{'0.' if listed else ''}")
        if not sections:
            yield f"{prefix}{name}", {typing.get_origin(part) or part for part in parts}


def inner_types(annotation: Any) -> Iterator[Any]:
    yield annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, dict, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from inner_types(part)


KEYS = dict(keys_of(Experiment))
METHOD_KEYS = [f"method.{name}" for kind in method_names() for name in method_class(kind).__dataclass_fields__]


@tries(400)
@given(
    keys=st.lists(st.sampled_from(sorted(KEYS)) | st.sampled_from([*METHOD_KEYS, "method.name"]), max_size=3),
    values=st.lists(VALUES, min_size=3, max_size=3),
    method=st.sampled_from(method_names()),
)
def test_any_value_in_any_key(place, keys, values, method):
    overrides = [f"method.name={method}", *map("{}={}".format, keys, values)]
    read(place, BASE, overrides)


@tries(200)
@given(override=st.text(max_size=40) | st.tuples(st.text(".0aé²\ud800", max_size=9), VALUES).map("=".join))
def test_any_override(place, override):
    read(place, BASE, [override])


def surroundings(key: str) -> list[str]:
    """Return the settings without which there is no place for a key."""
    if key.startswith("evaluation.tasks.0."):
        return ["evaluation.tasks=[{name: t, source: t.jsonl, kind: generation, prompt: '{q}'}]"]
    return ["population.profiles.0.rank.values=[1]"] if ".rank." in key else []


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "1" + "0" * 30])
@pytest.mark.parametrize("key", [key for key, kinds in KEYS.items() if float in kinds])
def test_no_number_is_nan_infinite_or_absurd(place, key, value):
    inside = f"{{a: {value}}}" if dict in KEYS[key] else f"[{value}]" if tuple in KEYS[key] else value
    rest = surroundings(key)

    assert re.search("finite number|less than|greater than", str(read(place, BASE, [*rest, f"{key}={inside}"])))


def test_the_schema_has_numbers_to_try():
    assert len([key for key, kinds in KEYS.items() if float in kinds]) > 30
    assert len([key for key, kinds in KEYS.items() if int in kinds]) > 15


@pytest.mark.parametrize("value", [LARGEST_COUNT + 1, 10**30])
@pytest.mark.parametrize("key", [key for key, kinds in KEYS.items() if int in kinds and key != "seed"])
def test_no_count_overflows(place, key, value):
    inside = f"{{a: {value}}}" if dict in KEYS[key] else f"[{value}]" if tuple in KEYS[key] else value
    rest = surroundings(key)

    assert "less than or equal to" in str(read(place, BASE, [*rest, f"{key}={inside}"]))


@pytest.mark.parametrize("value", [".nan", ".inf"])
@pytest.mark.parametrize("option", ["soft.orthogonality", "fslora.server_lr", "fslora.weight_decay", "florist.tau"])
def test_no_option_of_a_method_is_nan_or_infinite(place, option, value):
    method, _, name = option.partition(".")

    assert "finite number" in str(read(place, "", [f"method.name={method}", f"method.{name}={value}"]))


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases .* are not read"),
        ("name: &a [*a]", "aliases .* are not read"),
        ("a: " + "[" * 100_000, f"more than {MAX_DEPTH} levels"),
        ("".join(" " * i + "a:\n" for i in range(1000)), f"more than {MAX_DEPTH} levels"),
        ("evaluation: {targets: [" + "1," * MAX_VALUES + "]}", f"more than {MAX_VALUES} keys and values"),
        ("seed: " + "1" * 1000_000, "a number of 1000000 characters"),
        ("seed: 0x" + "f" * 100_000, "a number of 100002 characters"),
        ("name: " + "x" * MAX_TEXT_BYTES, f"at most {MAX_TEXT_BYTES} are read"),
        ("seed: !!bool x", "no value of the type 'bool'"),
        ("a: b\0c", "unacceptable character"),
    ],
)
def test_what_would_grow_is_refused_with_its_bound(place, text, message):
    place.write_text(text)

    with pytest.raises(FedloomError, match=message):
        load_experiment(place)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_is_no_file_is_refused_unopened(tmp_path):
    """A pipe would block for ever, and a device has no end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()

    for name in ("pipe.yaml", "zeros.yaml", "folder.yaml"):
        assert "not a file" in refused(lambda name=name: load_experiment(tmp_path / name))
    for name in ("absent.yaml", "a\0b", "a\udc80", "a" * 5000):
        assert "cannot be read" in refused(lambda name=name: load_experiment(tmp_path / name))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_file_that_grows_is_read_to_its_bound():
    """Files under /proc say that they are empty."""
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_bounded(Path("/proc/self/status"), 10)


@pytest.mark.parametrize(
    "unit", ["{name: a},", "{name: a, share: 1},", "k,", "[],", "{? {},? 1},", "'1':,", "!!binary aGk=,"]
)
def test_memory_is_bounded_by_the_number_of_values(place, unit):
    """100 000 values of any kind, the most that a file may hold, stay within the 256 MiB that the docstring states."""
    text = "population: {profiles: [" + unit * (MAX_VALUES // 20) + "]}"
    place.write_text(text)

    assert peak_bytes(lambda: load_experiment(place)) < 2**28 // 20 + 2**23


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_of_the_whole_process_is_bounded(place):
    """As many values as a file may hold, each of which becomes an error: libraries' memory counts too."""
    place.write_text("population: {profiles: [" + "[]," * (MAX_VALUES - 100) + "]}")
    warm = (
        "from pathlib import Path\n"
        "from fedloom.platform.errors import FedloomError\n"
        "from fedloom.platform.experiment_file import load_experiment, validated\n"
        "validated({}, place='')"
    )
    grown = peak_resident_bytes(warm, f"try: load_experiment(Path({str(place)!r}))\nexcept FedloomError: pass")

    assert grown < 2**28
