"""Whatever rows, adapters and checkpoints hold: a value or one of our errors, and memory within a bound.

FEDLOOM_FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz.py      # more of the same
"""

import contextlib
import json
import os
import tracemalloc

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small import make_data, make_experiment, save_llama

from fedloom.jobs.presets import experiment_path, preset_titles
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.data.examples import map_examples
from fedloom.platform.data.source import load_rows
from fedloom.platform.driver import run
from fedloom.platform.errors import FedloomError
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import DataSection, Experiment, PartitionSection
from fedloom.platform.experiment_file import validated
from fedloom.platform.peft_format import load_adapter, save_adapter
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble

MANY = settings(max_examples=int(os.environ.get("FEDLOOM_FUZZ_EXAMPLES", "150")))
FEW = settings(max_examples=int(os.environ.get("FEDLOOM_FUZZ_EXAMPLES", "30")))
MIB = 2**20

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


def outcome(function, *arguments):
    """Return a value, or ``None`` for one of our errors."""
    with contextlib.suppress(FedloomError):
        return function(*arguments)
    return None


def keys_of(tree, prefix=""):
    """Return the dotted keys of a document."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [key for name, value in pairs for key in (f"{prefix}{name}", *keys_of(value, f"{prefix}{name}."))]


EVERY_KEY = sorted({key for tree in [Experiment().model_dump(mode="json"), *PRESETS] for key in keys_of(tree)})


@MANY
@given(st.sampled_from(PRESETS), st.lists(st.tuples(st.sampled_from(EVERY_KEY), trees), min_size=1, max_size=3))
def test_presets_with_any_value_under_any_key(preset, changes):
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes]
    found = outcome(lambda: validated(preset, place="experiment.yaml", overrides=overrides))
    if found is not None:
        again = validated(found.model_dump(mode="json"), place="again.yaml")
        assert again.hash == found.hash  # what is accepted can be written down and read again


def peak_mib(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


rows = st.dictionaries(st.sampled_from(["text", "label", "split", "x"]), scalars | st.lists(st.integers()), max_size=4)


@FEW
@given(st.sampled_from([".jsonl", ".json", ".csv"]), st.binary(min_size=1, max_size=200))
@example(".jsonl", b"[" * 100_000)
@example(".jsonl", b'{"text": 1' + b"0" * 100_000 + b"}")
@example(".jsonl", b'{"text": "\\ud800", "label": "a"}\n' * 3)
@example(".csv", b'"')
@example(".csv", b"text,label\n\x00,\x00\n")
@example(".csv", b"text,text\na,b\n")
def test_any_bytes_as_rows(tmp_path_factory, suffix, content):
    check_rows(tmp_path_factory.mktemp("fuzz") / f"rows{suffix}", content)


@FEW
@given(st.lists(rows, min_size=1, max_size=6))
def test_any_json_as_rows(tmp_path_factory, values):
    content = "\n".join(json.dumps(value) for value in values).encode()
    check_rows(tmp_path_factory.mktemp("fuzz") / "rows.jsonl", content)


def check_rows(path, content):
    path.write_bytes(content)
    before = set(path.parent.iterdir())
    for kind in ("natural", "iid"):
        partition = PartitionSection.model_validate({"kind": kind, "num_clients": 2})
        section = DataSection(source=str(path))
        outcome(lambda section=section, partition=partition: map_examples(load_rows(section), section, partition))
    assert set(path.parent.iterdir()) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a saved adapter, its base model, and a checkpoint."""
    from fedloom.jobs.runs import base_of

    folder = tmp_path_factory.mktemp("saved")
    experiment = make_experiment(save_llama(folder / "llama"), rounds=2, method={"name": "florist"})
    prepared = assemble(experiment, make_data())
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
    with Checkpoints(folder / "run") as checkpoints:
        list(run(experiment, prepared, executor, checkpoints))
    save_adapter(folder / "adapter", executor.export(), base_of(experiment, prepared))
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


@MANY
@given(trees)
@example({"peft_type": "LORA", "r": 10**30})
@example({"peft_type": "LORA", "rank_pattern": [], "alpha_pattern": 3})
@example({"peft_type": "LORA", "rank_pattern": {"(": 3}})
@example({"peft_type": "LORA", "lora_alpha": "x"})
@example({"peft_type": "LORA", "use_rslora": True, "r": -1})
@example({"peft_type": "LORA", "r": 0})
def test_any_tree_as_an_adapter_s_configuration(saved, tree):
    path = saved / "adapter" / "adapter_config.json"
    document = json.loads(path.read_text()) | tree if isinstance(tree, dict) and "peft_type" in tree else tree
    with replaced(path, json.dumps(document).encode()):
        outcome(load_adapter, saved / "adapter")


@MANY
@given(st.binary(max_size=100))
@example(b"[" * 100_000)
def test_any_bytes_as_an_adapter_s_configuration(saved, content):
    with replaced(saved / "adapter" / "adapter_config.json", content):
        outcome(load_adapter, saved / "adapter")


tensors = st.dictionaries(
    st.text(max_size=5) | st.sampled_from(["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"]),
    st.sampled_from([torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(0), torch.zeros(1, 1, 1), torch.zeros(2).int()]),
    max_size=4,
)


@MANY
@given(tensors)
def test_any_tensors_as_an_adapter(saved, chosen):
    with replaced(saved / "adapter" / "adapter_model.safetensors", save({k: t.clone() for k, t in chosen.items()})):
        outcome(load_adapter, saved / "adapter")


@MANY
@given(st.data())
def test_damaged_safetensors(saved, data):
    """Any byte of the header changed, the file cut anywhere, lengths and offsets that point beyond it."""
    path = saved / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, end - 1))
    change = data.draw(st.binary(min_size=1, max_size=4))
    damaged = content[:place] + change + content[place + len(change) :]
    with replaced(path, damaged[: data.draw(st.integers(place, len(damaged)))]):
        outcome(load_adapter, saved / "adapter")


def test_a_header_that_claims_gigabytes_is_refused_without_them(saved):
    entry = {"dtype": "F32", "shape": [2**20, 2**12], "data_offsets": [0, 2**34]}
    header = json.dumps({"base_model.model.q.lora_A.weight": entry}).encode()
    for length in (len(header), 2**40, 2**63):
        with replaced(saved / "adapter" / "adapter_model.safetensors", length.to_bytes(8, "little") + header):
            assert peak_mib(lambda: outcome(load_adapter, saved / "adapter")) < 20


@FEW
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


@MANY
@given(trees)
def test_any_tree_as_a_manifest_or_progress(saved, tree):
    for name in ("manifest.json", "progress.json"):
        path = saved / "run" / "checkpoint-000002" / name
        with replaced(path, json.dumps(tree).encode()), Checkpoints(saved / "run") as read:
            found = read.load()
            assert found is None or len(found.rounds) == 2  # the checkpoint before
