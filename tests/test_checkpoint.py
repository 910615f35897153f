"""A run that was cut goes on to the same bits, wherever it was cut; a damaged checkpoint is noticed."""

import contextlib
import errno
import itertools
import json
import math
import os

import pytest
import torch
from small import KINDS, PRUNING, make_data, make_experiment, save_llama

from fedloom.platform import checkpoint as checkpoint_module
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run
from fedloom.platform.errors import CheckpointError
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.rounds import Round, round_from_json, round_to_json

DATA = make_data()
ROUNDS = 4
METHODS = [(name, {}) for name in KINDS] + [
    ("florist", {"flow": "continue"}),
    ("fslora", {"server_step": "adamw"}),
    ("hetlora", {option: value for option, value in PRUNING.items() if option != "name"}),
]
STEERED = {
    "population": {
        "profiles": [{"name": "phone", "share": 1, "rank": 4, "compute_gflop_per_s": 0.01, "availability": 0.8}]
    },
    "network": {"kind": "wireless", "bandwidth_mhz": 0.02},
    "cohort": {"size": 3, "sampler": "by_availability", "on_missing": "skip"},
    "controller": {"name": "tsfa", "latency_limit_s": 0.01},
    "evaluation": {"batch_size": 8, "targets": [0.01, 0.3]},
}


class PlugPulledError(Exception):
    """Somebody has pulled the plug."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def played(experiment, folder=None, *, until=None, every=1):
    """Run, with checkpoints if a folder is given, and stop after round ``until`` if one is given."""
    prepared = assemble(experiment, DATA)
    executor = LocalExecutor(prepared.spec, DATA, pools_of(experiment))
    opened = contextlib.nullcontext() if folder is None else Checkpoints(folder, every=every)
    try:
        with opened as checkpoints:
            rounds = []
            for done in run(experiment, prepared, executor, checkpoints):
                rounds.append(done)
                if done.number == until:
                    break
            return rounds, executor.export().tensors(), checkpoints
    finally:
        executor.close()


def without_seconds(rounds):
    """Return rounds as JSON text but for real time: NaN is equal to itself there."""
    found = []
    for done in rounds:
        values = round_to_json(done)
        values["metrics"] = {name: value for name, value in values["metrics"].items() if name != "seconds"}
        values["records"] = [record | {"seconds": 0.0} for record in values["records"]]
        found.append(json.dumps(values, sort_keys=True))
    return found


def assert_same(left, right):
    assert without_seconds(left[0]) == without_seconds(right[0])
    assert left[1].keys() == right[1].keys()
    assert all(torch.equal(tensor, right[1][name]) for name, tensor in left[1].items())


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_a_cut_run_ends_with_the_same_bits(llama, tmp_path, name, options):
    """After an odd and an even round, since some methods take turns. One method is cut after every round below."""
    experiment = make_experiment(llama, method={"name": name, **options}, rounds=ROUNDS)
    whole = played(experiment)
    for cut in (1, 2):
        folder = tmp_path / f"cut-{cut}"
        played(experiment, folder, until=cut)
        assert_same(played(experiment, folder), whole)


@pytest.mark.parametrize("method", ["soft", "fslora"])
def test_the_world_goes_on_too(llama, tmp_path, method):
    """Queue, importance, participation, simulated time, targets: none of it starts anew."""
    experiment = make_experiment(llama, rounds=6, method={"name": method}, **STEERED)
    whole = played(experiment)
    assert whole[0][-1].metrics["controller/queue_s"] > 0
    for cut in (1, 3, 5):
        folder = tmp_path / f"cut-{cut}"
        played(experiment, folder, until=cut)
        assert_same(played(experiment, folder), whole)


def test_a_run_may_be_cut_again_and_again(llama, tmp_path):
    experiment = make_experiment(llama, method={"name": "florist"}, rounds=ROUNDS)
    for cut in range(ROUNDS + 1):
        rounds, _, checkpoints = played(experiment, tmp_path, until=cut)
        assert checkpoints.num_restored == (cut if cut > 1 else 0)  # there is none after round 0
        assert [done.number for done in rounds] == list(range(cut + 1))
    assert_same(played(experiment, tmp_path), played(experiment))


def test_rounds_since_the_last_checkpoint_are_played_again(llama, tmp_path):
    experiment = make_experiment(llama, method={"name": "flexlora"}, rounds=5)
    played(experiment, tmp_path, until=4, every=3)
    resumed = played(experiment, tmp_path, every=3)
    assert resumed[2].num_restored == 4  # round 0 and three more
    assert_same(resumed, played(experiment))


def test_the_newest_are_kept(llama, tmp_path):
    played(make_experiment(llama, rounds=ROUNDS), tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{ROUNDS - 1:06d}", f"checkpoint-{ROUNDS:06d}"]


def cut_at(monkeypatch, operation, count):
    """Let the ``count``-th call of an operation on files end the process's work."""
    calls = itertools.count(1)
    real = getattr(os, operation)

    def failing(*args, **settings):
        if next(calls) == count:
            raise PlugPulledError
        return real(*args, **settings)

    monkeypatch.setattr(os, operation, failing)


@pytest.mark.parametrize("operation", ["fsync", "replace", "rename"])
def test_a_checkpoint_that_was_cut_is_no_checkpoint(llama, tmp_path, monkeypatch, operation):
    """Whatever call on files is the last one that a process makes, the run goes on to the same bits."""
    experiment = make_experiment(llama, method={"name": "florist"}, rounds=2)
    whole = played(experiment)
    for count in itertools.count(1):
        folder = tmp_path / f"{operation}-{count}"
        with monkeypatch.context() as patched:
            cut_at(patched, operation, count)
            try:
                played(experiment, folder)
            except PlugPulledError:
                done = False
            else:
                done = True
        resumed = played(experiment, folder)
        assert resumed[2].notes == []
        assert_same(resumed, whole)
        if done:
            break
    assert count > 2


@pytest.mark.parametrize("name", ["state.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(llama, tmp_path, name, damage):
    experiment = make_experiment(llama, method={"name": "fslora"}, rounds=ROUNDS)
    played(experiment, tmp_path, until=3)
    spoil(tmp_path / "checkpoint-000003" / name, damage)

    resumed = played(experiment, tmp_path)

    assert resumed[2].num_restored == 3
    (note,) = resumed[2].notes
    assert "checkpoint-000003 is damaged and passed over" in note
    assert_same(resumed, played(experiment))


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_round_or_piece_costs_the_rounds_after_it(llama, tmp_path, damage):
    experiment = make_experiment(llama, method={"name": "florist"}, rounds=ROUNDS)
    whole = played(experiment)
    for name in ("rounds/000003.json", "pieces/000002.safetensors", "rounds/000000.json"):
        folder = tmp_path / name.replace("/", "-")
        played(experiment, folder, until=3)
        spoil(folder / name, damage)
        resumed = played(experiment, folder)
        assert resumed[2].notes
        assert_same(resumed, whole)


def spoil(path, damage):
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(llama, tmp_path, monkeypatch):
    experiment = make_experiment(llama, rounds=ROUNDS)
    real = checkpoint_module.write_synced

    def full(path, content):
        if path.name == "state.safetensors" and "000003" in path.parent.name:
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "write_synced", full)
        with pytest.raises(CheckpointError, match="checkpoint-000003: cannot be written: No space left on device"):
            played(experiment, tmp_path)

    assert not list(tmp_path.glob("*.partial"))
    resumed = played(experiment, tmp_path)
    assert resumed[2].num_restored == 3
    assert_same(resumed, played(experiment))


def test_only_one_process_holds_a_run(tmp_path):
    with Checkpoints(tmp_path), pytest.raises(CheckpointError, match="is going on in another process"):
        Checkpoints(tmp_path)
    with Checkpoints(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "run")


def test_rounds_keep_every_bit_of_their_numbers():
    metrics = {"a": 0.1 + 0.2, "b": math.inf, "c": math.nan, "d": 5e-324, "e": 3}
    there = json.loads(json.dumps(round_to_json(Round(number=7, metrics=metrics))))
    again = round_from_json(there)
    assert again.number == 7
    assert [math.isnan(value) or value for value in again.metrics.values()] == [0.1 + 0.2, math.inf, True, 5e-324, 3]
    with pytest.raises(KeyError):
        round_from_json({})
