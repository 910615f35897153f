"""Whatever presets and checkpoints hold: a value or one of our errors."""

import contextlib
import json

import pytest
import yaml
from hostile import outcome, tries
from hypothesis import given
from hypothesis import strategies as st
from small import make_data, make_experiment, save_llama

from fedloom.jobs.presets import experiment_path, preset_titles
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(2**63), 2**63, 0, -1]),
    st.floats(),
    st.text(),
    st.sampled_from(["\x00", "\ud800", "auto", "1e400", "../..", "a" * 1000]),
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
PRESETS = [yaml.safe_load(experiment_path(name).read_text()) for name in preset_titles()]


def keys_of(tree, prefix=""):
    """Return the dotted keys of a document."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [key for name, value in pairs for key in (f"{prefix}{name}", *keys_of(value, f"{prefix}{name}."))]


EVERY_KEY = sorted({key for tree in [Experiment().model_dump(mode="json"), *PRESETS] for key in keys_of(tree)})


@tries(150)
@given(st.sampled_from(PRESETS), st.lists(st.tuples(st.sampled_from(EVERY_KEY), trees), min_size=1, max_size=3))
def test_presets_with_any_value_under_any_key(preset, changes):
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes]
    found = outcome(lambda: validated(preset, place="experiment.yaml", overrides=overrides))
    if isinstance(found, Experiment):
        again = validated(found.model_dump(mode="json"), place="again.yaml")
        assert again.hash == found.hash  # what is accepted can be written down and read again


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of a run."""
    folder = tmp_path_factory.mktemp("saved")
    experiment = make_experiment(save_llama(folder / "llama"), rounds=2, method={"name": "florist"})
    prepared = assemble(experiment, make_data())
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
    with Checkpoints(folder / "run") as checkpoints:
        list(run(experiment, prepared, executor, checkpoints))
    executor.close()
    return folder


@contextlib.contextmanager
def replaced(path, content):
    """Put other contents into a file for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@tries(30)
@given(st.data())
def test_damaged_checkpoints_are_passed_over(saved, data):
    """A byte anywhere in any file: what is loaded is a whole checkpoint or none."""
    files = sorted(path for path in (saved / "run").rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    with (
        replaced(path, changed[: data.draw(st.sampled_from([place, len(changed)]))]),
        Checkpoints(saved / "run") as read,
    ):
        found = read.load()
        assert found is None or [done.number for done in found.rounds] == list(range(len(found.rounds)))
        assert read.notes or found is not None


@tries(150)
@given(trees)
def test_any_tree_as_a_manifest_or_progress(saved, tree):
    for name in ("manifest.json", "progress.json"):
        path = saved / "run" / "checkpoint-000002" / name
        with replaced(path, json.dumps(tree).encode()), Checkpoints(saved / "run") as read:
            found = read.load()
            assert found is None or len(found.rounds) == 2  # the checkpoint before
