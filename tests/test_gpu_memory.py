"""An actor that its share of a GPU cannot hold is refused with the arithmetic, and with what would do."""

import pytest
from small import make_data, make_experiment, save_llama

from fedloom.platform.errors import ExperimentError
from fedloom.platform.gpu_memory import GIB, GpuNeed, check_gpu_memory
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble, footprint, gpu_needs


def check(need, *, free=80.0, total=80.0, num_gpus=1.0):
    """All in GiB."""
    check_gpu_memory(free_bytes=free * GIB, total_bytes=total * GIB, num_gpus=num_gpus, need_bytes=need * GIB)


@pytest.mark.parametrize("num_gpus", [0.1, 0.25, 0.5, 1.0, 2.0])
def test_what_fits_both_share_and_free_memory_is_let_in(num_gpus):
    share = min(1.0, num_gpus) * 80

    check(share, num_gpus=num_gpus)
    check(share / 2, free=share / 2, num_gpus=num_gpus)


@pytest.mark.parametrize("need", [0.5, 7.3, 20.0, 26.7, 39.9, 61.0, 80.0])
def test_the_fraction_that_is_advised_is_let_in_and_a_hundredth_less_is_not(need):
    with pytest.raises(ExperimentError, match="Set num_gpus to at least") as refused:
        check(need, num_gpus=need / 80 - 0.001)
    advised = float(str(refused.value).split("at least ")[1].split(":")[0])

    check(need, num_gpus=advised)
    with pytest.raises(ExperimentError):
        check(need, num_gpus=advised - 0.01)


def test_the_message_counts_who_shares_a_device():
    with pytest.raises(
        ExperimentError,
        match=r"num_gpus 0\.25 of a GPU with 80 GiB is 20 GiB, but training takes 30 GiB\. "
        r"Set num_gpus to at least 0\.38: then at most 2 actors share a GPU\.",
    ):
        check(30, num_gpus=0.25)


def test_memory_that_others_hold_is_not_counted_on():
    with pytest.raises(ExperimentError, match=r"takes 30 GiB, but only 12 of the 80 GiB of a GPU are free: other"):
        check(30, free=12, num_gpus=0.5)


def test_what_no_gpu_of_the_kind_holds_is_not_advised_a_fraction():
    with pytest.raises(ExperimentError, match=r"takes 90 GiB and a GPU of the cluster has 80 GiB\. A smaller"):
        check(90, num_gpus=0.5)


def test_a_pool_needs_what_the_largest_of_its_clients_needs(tmp_path):
    """Weights, adapter, head and activations, as a plan counts them; a pool without GPUs needs none."""
    profiles = [
        {"name": "low", "share": 1, "rank": 2, "num_gpus": 0.5},
        {"name": "high", "share": 1, "rank": 8, "num_gpus": 0.5},
        {"name": "cpu", "share": 1, "rank": 8},
    ]
    llama = save_llama(tmp_path / "llama")
    experiment = make_experiment(llama, population={"profiles": profiles}, method={"name": "flexlora"})
    prepared = assemble(experiment, make_data())
    (shared,) = [pool for pool in pools_of(experiment) if dict(pool)["num_gpus"]]

    assert gpu_needs(prepared) == {shared: footprint(prepared).total_bytes(8)}


@pytest.mark.gpu
def test_a_device_is_measured():
    GpuNeed(num_gpus=1.0, need_bytes=1.0).check_device()
    with pytest.raises(ExperimentError, match="a GPU of the cluster has"):
        GpuNeed(num_gpus=1.0, need_bytes=2.0**60).check_device()
