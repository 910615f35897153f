"""What cannot fit is refused before it is started, with what would."""

import pytest
from small import make_data, make_experiment, save_llama

from fedloom.platform.driver import assemble, trained_ranks
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.world.memory import GIB, check_memory, least_memory_bytes

SHAPES = {"q": (100, 60), "v": (20, 20)}  # 200 values per rank


def experiment(memory_gib, rank=8, **training):
    profile = {"name": "phone", "share": 1, "rank": rank, "memory_gib": memory_gib}
    return Experiment.model_validate({"population": {"profiles": [profile]}, "training": training})


def least(described, rank):
    return least_memory_bytes(described, num_parameters=1000, per_rank=200, head_parameters=30, rank=rank)


@pytest.mark.parametrize(
    ("training", "copies"),
    [({}, 4), ({"optimizer": "sgd"}, 2), ({"optimizer": "sgd", "momentum": 0.9}, 3)],
)
def test_weights_gradients_and_moments_are_counted(training, copies):
    assert least(experiment(1, **training), rank=8) == 4 * 1000 + 4 * copies * (8 * 200 + 30)


def check(described, rank):
    check_memory(described, num_parameters=1000, shapes=SHAPES, head_parameters=30, rank_of={"phone": rank})


def test_the_largest_rank_that_fits_is_named_and_does_fit():
    memory_gib = (least(experiment(1), rank=5) + 100) / GIB

    check(experiment(memory_gib), 5)
    with pytest.raises(ExperimentError, match=r"profile 'phone' has memory_gib .* rank 6 takes .*Rank 5 would fit"):
        check(experiment(memory_gib), 6)


def test_a_machine_that_cannot_hold_the_model_is_told_so():
    with pytest.raises(ExperimentError, match=r"Even rank 1 needs"):
        check(experiment(1e-9), 1)


def test_ranks_are_those_that_the_method_sends_out(tmp_path):
    """FedIT and SOFT train the global rank, the others the client's; FSLoRA a ratio of the global one."""
    llama = save_llama(tmp_path / "llama")
    profiles = [{"name": "half", "share": 1, "rank": 4, "ratio": 0.25}, {"name": "large", "share": 1, "rank": 8}]
    expected = {
        "fedit": {"half": 4, "large": 4},
        "soft": {"half": 8, "large": 8},
        "flexlora": {"half": 4, "large": 8},
        "fslora": {"half": 2, "large": 8},
    }
    for name, ranks in expected.items():
        described = make_experiment(llama, population={"profiles": profiles}, method={"name": name})
        assert trained_ranks(described, assemble(described, make_data())) == ranks, name
