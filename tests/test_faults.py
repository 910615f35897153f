"""What is lost is done again with the same seeds; what cannot be made up for ends the run and says so."""

import contextlib
import os
import signal
import sys
import threading

import pytest
import torch
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform import worker as worker_module
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run, run_through_loss
from fedloom.platform.errors import GroupLostError, RoundError, ServerLostError
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.worker import ClientWorker

DATA = make_data()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def fragile_worker(folder):
    """Return a class of actors that do what the names of files in a folder say, each once, while a client trains."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import a module of tests

    class Fragile(ClientWorker):
        def train_client(self, chunk, client, dispatch):
            trained = super().train_client(chunk, client, dispatch)
            do("kill", "hang")
            return trained

        def train_all(self, chunks):
            do("lose")
            return super().train_all(chunks)

    def do(*kinds):
        for file in sorted(folder.iterdir()):
            kind = file.name.partition("-")[0]
            with contextlib.suppress(FileNotFoundError):  # another actor has done it
                if kind in kinds:
                    file.unlink()
                    DEEDS[kind]()

    return Fragile


def lose_group():
    raise GroupLostError("process 1 has ended")


DEEDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: threading.Event().wait(),
    "lose": lose_group,  # under DeepSpeed: the actor is there and says so
}


@pytest.fixture(scope="module")
def deeds(tmp_path_factory):
    """The folder in which a test says what is to happen to actors."""
    return tmp_path_factory.mktemp("deeds")


@pytest.fixture(scope="module")
def place(ray_local, llama, deeds):
    """A server and two client actors, which serve one run after another, whatever has become of the one before."""
    prepared = assemble(make_experiment(llama), DATA)
    executor = RayExecutor(prepared.spec, DATA, pools_of(prepared.experiment), actors=2, worker=fragile_worker(deeds))
    yield executor
    executor.close()


def played(place, experiment, *, checkpoints=None, disturb=None):
    """Play a run; ``disturb(executor, done)`` is called after every round."""
    prepared = assemble(experiment, DATA)
    rounds = []
    for done in (
        run(experiment, prepared, place)
        if checkpoints is None
        else run_through_loss(experiment, prepared, place, checkpoints)
    ):
        rounds.append(done)
        if disturb is not None:
            disturb(place, done)
    return rounds, place.export()


def comparable(rounds):
    """Return what must not depend on faults: all metrics and records but real time and the count of retries."""
    metrics = [{k: v for k, v in done.metrics.items() if k not in {"seconds", "retries"}} for done in rounds]
    records = [[(record.client, record.bytes_up, record.loss, record.steps) for record in d.records] for d in rounds]
    return metrics, records


def assert_same(left, right):
    assert comparable(left[0]) == comparable(right[0])
    tensors = right[1].tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in left[1].tensors().items())


def retries_of(rounds):
    return sum(done.metrics.get("retries", 0) for done in rounds)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # an actor that takes the place of another imports and loads what it needs
def test_actors_that_are_lost_leave_no_trace_in_the_result(place, llama, deeds):
    experiment = make_experiment(llama, method={"name": "florist"}, faults={"timeout_s": 5.0})
    for name in ("kill", "hang", "lose"):
        (deeds / name).touch()

    disturbed = played(place, experiment)

    assert list(deeds.iterdir()) == []
    assert retries_of(disturbed[0]) >= 2  # some may be hit by the same call
    assert_same(disturbed, finished(experiment))


@pytest.mark.ray
def test_more_losses_than_allowed_end_the_run(place, llama, deeds):
    experiment = make_experiment(llama, faults={"infrastructure": 0})
    (deeds / "kill").touch()
    with pytest.raises(RoundError, match=r"fault 1 of kind 'infrastructure', and faults.infrastructure allows 0"):
        played(place, experiment)


@pytest.mark.ray
def test_a_lost_server_is_put_back_from_the_checkpoint(place, llama, tmp_path):
    import ray

    experiment = make_experiment(llama, method={"name": "florist"})

    def kill_server(executor, done):
        if done.number in {0, 2}:
            ray.kill(executor._server, no_restart=True)

    with Checkpoints(tmp_path) as checkpoints:
        disturbed = played(place, experiment, checkpoints=checkpoints, disturb=kill_server)

    assert [done.number for done in disturbed[0]] == [0, 1, 2, 3]
    assert_same(disturbed, finished(experiment))


@pytest.mark.ray
def test_a_server_lost_more_often_than_allowed_ends_the_run(place, llama, tmp_path):
    import ray

    experiment = make_experiment(llama, faults={"infrastructure": 0})

    def kill_server(executor, done):
        ray.kill(executor._server, no_restart=True)

    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ServerLostError, match="server actor of this run was lost"),
    ):
        played(place, experiment, checkpoints=checkpoints, disturb=kill_server)


def failing(error, client):
    """Return the trainer, with an error for one client."""
    train = worker_module.train_client

    def trainer(*arguments, **settings):
        if settings["client"] == client:
            raise error
        return train(*arguments, **settings)

    return trainer


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("no such\ncolumn"), "errors", r"an error in training: ValueError: no such column \(test_faults.py"),
        (torch.OutOfMemoryError("tried to allocate"), "out_of_memory", "out of memory: tried to allocate"),
        (MemoryError(), "out_of_memory", "out of memory"),
    ],
)
def test_what_training_raises_is_shown_with_its_client_or_leaves_it_out(llama, monkeypatch, error, kind, words):
    """Within the budget, the round is one in which that client never trained; beyond it, the run ends."""
    plain = make_experiment(llama, rounds=1, method={"name": "flexlora"})
    victim = finished(plain)[0][1].records[1].client
    monkeypatch.setattr(worker_module, "train_client", failing(error, victim))

    strict, lenient = (make_experiment(llama, rounds=1, faults={kind: allowed}) for allowed in (0, 1))
    with pytest.raises(RoundError, match=rf"round 1: client '{victim}' of profile .*: {words}"):
        finished(strict)

    rounds, _ = finished(lenient)
    (refused,) = [record for record in rounds[1].records if record.refused]
    assert (refused.client, refused.fault) == (victim, kind)
    assert rounds[1].metrics["updates"] == 3


def test_faults_of_earlier_rounds_count_after_a_resume(llama, monkeypatch, tmp_path):
    experiment = make_experiment(llama, rounds=3, faults={"errors": 1}, cohort={"size": 6})
    monkeypatch.setattr(worker_module, "train_client", failing(ValueError("broken"), "c1"))
    prepared = assemble(experiment, DATA)
    executor = LocalExecutor(prepared.spec, DATA, pools_of(experiment))
    try:
        with Checkpoints(tmp_path) as checkpoints:
            next(done for done in run(experiment, prepared, executor, checkpoints) if done.number == 1)
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(RoundError, match="round 2: client 'c1'"):
            list(run(experiment, prepared, executor, checkpoints))
    finally:
        executor.close()
