"""What cannot fit is refused before it is started, with what would."""

import pytest
import torch
from small import finished, make_data, make_experiment, save_llama, save_roberta

from fedloom.platform.activations import activation_bytes
from fedloom.platform.adapter import Template, initial_adapter
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.method import ALL_TRAINABLE
from fedloom.platform.preparation import assemble, footprint, trained_ranks
from fedloom.platform.world.memory import GIB, Footprint, check_memory, with_automatic_ranks

FOOTPRINT = Footprint(weights_bytes=4000, head_bytes=480, rank_bytes=3200, activation_bytes=1000, largest_rank=20)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def experiment(memory_gib, rank=8, **profile):
    profile = {"name": "phone", "share": 1, "rank": rank, "memory_gib": memory_gib, **profile}
    return Experiment.model_validate({"population": {"profiles": [profile]}})


@pytest.mark.parametrize(
    ("training", "copies"),
    [({}, 4), ({"optimizer": "sgd"}, 2), ({"optimizer": "sgd", "momentum": 0.9}, 3)],
)
def test_weights_gradients_moments_and_activations_are_counted(llama, training, copies):
    described = make_experiment(llama, training={"batch_size": 4, **training})
    prepared = assemble(described, make_data())
    counted = footprint(prepared)
    values = sum(d_out + d_in for d_out, d_in in prepared.shapes.values())
    tokens = 4 * 8  # four examples of at most eight tokens

    assert counted.weights_bytes == 4 * prepared.num_parameters
    assert counted.head_bytes == 4 * copies * 3 * 16
    assert counted.rank_bytes == 4 * copies * values + 4 * tokens * len(prepared.shapes)
    assert counted.total_bytes(3) - counted.total_bytes(1) == 2 * counted.rank_bytes


@pytest.mark.parametrize(
    ("save", "task"),
    [(save_llama, "classification"), (save_llama, "causal_lm"), (save_roberta, "classification")],
)
def test_activations_without_a_device_are_those_of_a_real_pass(tmp_path, save, task):
    """What autograd holds at rank 8 on the CPU, mask of the padding included, within 2%."""
    described = make_experiment(save(tmp_path / "model"), data={"task": task})
    prepared = assemble(described, make_data(task=task))
    counted, batch = footprint(prepared), (4, 8)

    fixed = activation_bytes(prepared.spec, batch_size=batch[0], length=batch[1])
    predicted = fixed + 7 * 4 * batch[0] * batch[1] * len(prepared.shapes)

    assert counted.activation_bytes == fixed
    assert predicted == pytest.approx(really_saved(prepared, *batch, rank=8), rel=0.02)


def really_saved(prepared, batch_size, length, *, rank):
    host = AdapterHost(prepared.spec)
    template = Template(shapes=host.shapes, head=host.initial_head(0), rank=rank, scale=1.0)
    host.wear(initial_adapter(template, torch.Generator().manual_seed(0)), trainable=ALL_TRAINABLE)
    weights = {parameter.untyped_storage().data_ptr() for parameter in host.model.parameters()}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    host.model.train()
    ids = torch.full((batch_size, length), 5)
    labels = ids if prepared.spec.task == "causal_lm" else torch.zeros(batch_size, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = host.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_the_largest_rank_that_fits_is_named_and_does_fit():
    described = experiment((FOOTPRINT.total_bytes(5) + 100) / GIB)

    check_memory(described, FOOTPRINT, {"phone": 5})
    with pytest.raises(ExperimentError, match=r"profile 'phone' has memory_gib .* rank 6 takes .*Rank 5 would fit"):
        check_memory(described, FOOTPRINT, {"phone": 6})


def test_a_machine_that_cannot_hold_the_model_is_told_so():
    with pytest.raises(ExperimentError, match=r"Even rank 1 needs"):
        check_memory(experiment(1e-9), FOOTPRINT, {"phone": 1})


def test_an_automatic_rank_is_the_largest_that_fits():
    for rank in (1, 7, 20):
        for spare in (0, FOOTPRINT.rank_bytes - 1):
            described = experiment((FOOTPRINT.total_bytes(rank) + spare) / GIB, rank="auto")
            (profile,) = with_automatic_ranks(described, FOOTPRINT).population.profiles
            assert profile.rank == rank
    (profile,) = with_automatic_ranks(experiment(1, rank="auto"), FOOTPRINT).population.profiles
    assert profile.rank == FOOTPRINT.largest_rank
    with pytest.raises(ExperimentError, match="rank 'auto', but no rank fits"):
        with_automatic_ranks(experiment(1e-9, rank="auto"), FOOTPRINT)


def test_the_memory_of_a_client_with_a_gpu_is_the_gpu_s():
    described = experiment(1e-9, rank="auto", num_gpus=0.5, gpu_memory_gib=FOOTPRINT.total_bytes(3) / GIB)
    (profile,) = with_automatic_ranks(described, FOOTPRINT).population.profiles
    assert profile.rank == 3


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"rank": "auto"}, "set it, e.g. memory_gib: 8"),
        ({"rank": "auto", "num_gpus": 1, "memory_gib": 8}, "set it, e.g. gpu_memory_gib: 8"),
        ({"rank": "auto", "memory_gib": 8, "rank_pattern": {"q": 4}}, "rank 'auto' and a rank_pattern"),
    ],
)
def test_what_an_automatic_rank_needs_is_said(profile, message):
    with pytest.raises(ExperimentError, match=message):
        validated({"population": {"profiles": [{"name": "p", "share": 1, **profile}]}}, place="experiment.yaml")


def test_clients_with_automatic_ranks_run_at_them(llama):
    need = footprint(assemble(make_experiment(llama), make_data()))
    profiles = [
        {"name": f"rank-{rank}", "share": 1, "rank": "auto", "memory_gib": need.total_bytes(rank) / GIB}
        for rank in (2, 5)
    ]
    described = make_experiment(
        llama, population={"profiles": profiles}, method={"name": "flexlora"}, cohort={"size": 6}
    )
    prepared = assemble(described, make_data())

    assert {f"rank-{client.rank}" == client.profile for client in prepared.clients} == {True}
    assert [profile.rank for profile in prepared.experiment.population.profiles] == [2, 5]
    rounds, _ = finished(described)
    assert {record.rank for record in rounds[1].records} == {2, 5}


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
