"""Ray changes where a round happens and nothing else."""

import sys
from pathlib import Path

import pytest
import torch
from small import KINDS, make_data, make_experiment, save_llama

from fedloom.platform.driver import run
from fedloom.platform.errors import ExperimentError
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.ray_cluster import actors_per_pool
from fedloom.platform.ray_executor import RayExecutor

DATA = make_data()
HERE = Path(__file__).parent
SPEEDS = {"slow": 0.001, "fast": 0.1}  # GFLOP/s


def pool(**demand):
    return tuple(sorted({"num_gpus": 0.0, **demand}.items()))


def alike(*pools):
    """On a cluster that has all that is asked for, a pool's demand is its name."""
    return {pool: pool for pool in pools}


def test_actors_fill_the_cluster_in_turn():
    """Five CPUs: one actor each takes 3, one more of the small pool 4, the large one fits no more, a small one does."""
    small, large = pool(num_cpus=1.0), pool(num_cpus=2.0)
    five, two = {"num_cpus": 5.0}, {"num_cpus": 2.0}

    assert {small: 3, large: 1} == actors_per_pool(alike(small, large), five, five)
    assert {small: 1, large: 1} == actors_per_pool(alike(small, large), five, two)  # the rest is in use: they may wait
    assert {small: 1, large: 1} == actors_per_pool(alike(small, large), five, five, exactly=1)


def test_fractions_of_a_gpu_are_counted():
    quarter = pool(num_cpus=0.1, num_gpus=0.25)

    cluster = {"num_cpus": 4.0, "num_gpus": 2.0}

    assert {quarter: 8} == actors_per_pool(alike(quarter), cluster, cluster)


def test_a_cluster_that_is_too_small_is_refused_with_the_arithmetic():
    pools = [pool(num_cpus=2.0), pool(num_cpus=1.0, rack=1.0)]

    with pytest.raises(
        ExperimentError, match=r"need num_cpus 3, rack 1 at once but the cluster has num_cpus 2, rack 0"
    ):
        actors_per_pool(alike(*pools), {"num_cpus": 2.0}, {"num_cpus": 2.0})


@pytest.mark.ray
def test_one_actor_two_actors_and_none_give_the_same_bits(ray_local, tmp_path):
    """Every kind of method, and a deadline: adapters and scores are equal in this process, on one actor and on two."""
    llama = save_llama(tmp_path / "llama")
    experiments = {name: make_experiment(llama, method={"name": name}) for name in KINDS}
    experiments["memory"] = make_experiment(llama, method={"name": "fedsa"})  # and models of the clients' own
    experiments["deadline"] = make_experiment(
        llama,
        population={"profiles": [{"name": n, "share": 1, "compute_gflop_per_s": s} for n, s in SPEEDS.items()]},
        network={"kind": "wireless"},
        cohort={"size": 4, "deadline_s": 0.3, "on_missing": "skip"},
        method={"name": "soft"},
    )
    prepared = assemble(make_experiment(llama), DATA)
    pools = pools_of(make_experiment(llama))
    executors = {
        "local": lambda: LocalExecutor(prepared.spec, DATA, pools),
        "one actor": lambda: RayExecutor(prepared.spec, DATA, pools, actors=1),
        "two actors": lambda: RayExecutor(prepared.spec, DATA, pools, actors=2),
    }
    results = {}
    for where, start in executors.items():
        executor = start()
        try:
            for name, experiment in experiments.items():
                rounds = list(run(experiment, assemble(experiment, DATA), executor))
                metrics = [{key: v for key, v in done.metrics.items() if key != "seconds"} for done in rounds]
                assert "clients/accuracy/worst_decile" in metrics[-1]
                results[where, name] = (metrics, rounds[-1].clients, executor.export().tensors())
            if where == "two actors":
                assert_weights_are_shared(executor)
        finally:
            executor.close()

    assert {done["stragglers"] for done in results["local", "deadline"][0][1:]} - {0, 4}, (
        "some are cut and some are not"
    )
    for name in experiments:
        metrics, clients, tensors = results["local", name]
        for where in ("one actor", "two actors"):
            other_metrics, other_clients, other_tensors = results[where, name]
            assert metrics == other_metrics, (name, where)
            assert clients == other_clients, (name, where)
            assert all(torch.equal(tensor, other_tensors[key]) for key, tensor in tensors.items()), (name, where)


def assert_weights_are_shared(executor):
    """After many rounds, frozen weights of both actors are at the same place of the object store's memory."""
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import a module of tests
    first, second = ray.get([slot.actor.__ray_call__.remote(memory_of_weights) for slot in executor.crew.slots])

    assert first
    assert first == second
    assert all("plasma" in place for place in first.values())


def memory_of_weights(worker):
    """Return inode, offset and name of what this process has mapped where each frozen weight is."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(end, 16) for end in span.split("-")) for span, *_ in maps]
    places = {}
    for name, parameter in worker._host.model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            continue
        address = parameter.data_ptr()
        index = next(i for i, (start, end) in enumerate(spans) if start <= address < end)
        _, _, offset, _, inode, *file = maps[index]
        places[name] = f"{inode} {int(offset, 16) + address - spans[index][0]} {file}"
    return places
