"""Local training does what the dispatch says, and its bits depend on nothing else."""

import numpy as np
import pytest
import torch
from small import make_data, make_experiment, save_llama
from transformers import get_linear_schedule_with_warmup

from fedloom.platform.adapter import Template, initial_adapter
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.data.federated import collate
from fedloom.platform.errors import ModelError
from fedloom.platform.experiment import TrainingSection
from fedloom.platform.method import ALL_TRAINABLE, Dispatch, Payload, Penalty
from fedloom.platform.preparation import assemble
from fedloom.platform.received import received_adapter
from fedloom.platform.trainer import batches, train_client

DATA = make_data()
SETTINGS = TrainingSection(learning_rate=0.05, batch_size=4, steps=6)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    experiment = make_experiment(save_llama(tmp_path_factory.mktemp("model") / "llama"))
    return AdapterHost(assemble(experiment, DATA).spec)


def start(host, rank=2):
    template = Template(shapes=host.shapes, head=host.initial_head(0), rank=rank, scale=2.0)
    return initial_adapter(template, torch.Generator().manual_seed(0))


def train(host, adapter, *, data=DATA, settings=SETTINGS, client="c0", seed=1, **dispatch):
    sent = Dispatch(
        payload=Payload(tensors=adapter.tensors()),
        rank=2,
        global_rank=2,
        scale=adapter.scale,
        **{"trainable": ALL_TRAINABLE} | dispatch,
    )
    return train_client(
        host,
        data,
        settings,
        dispatch=sent,
        received=received_adapter(sent, host.shapes),
        patch=None,
        patch_scale=2.0,
        client=client,
        seed=seed,
    )


def same(left, right):
    return all(torch.equal(tensor, right.tensors()[name]) for name, tensor in left.tensors().items())


def test_the_same_arguments_give_the_same_bits_whatever_came_before(host):
    """The global generator is neither read nor moved, and other clients leave no trace."""
    adapter = start(host)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = train(host, adapter).adapter
    after = torch.random.get_rng_state()

    train(host, start(host, rank=5), client="c3", seed=9)
    torch.manual_seed(12)
    again = train(host, adapter).adapter

    assert torch.equal(before, after)
    assert same(first, again)
    assert not same(first, train(host, adapter, seed=2).adapter)


def test_training_lowers_the_loss(host):
    """The class can be read off the first token, so many steps must learn it."""
    adapter = start(host)

    early = train(host, adapter, settings=SETTINGS.model_copy(update={"steps": 4}))
    late = train(host, adapter, settings=SETTINGS.model_copy(update={"steps": 80}))

    assert (early.steps, late.steps) == (4, 80)
    assert late.loss < 0.7 * early.loss


@pytest.mark.parametrize("kinds", [{"A", "B"}, {"B", "head"}, {"A", "B", "head"}, {"head"}])
def test_what_is_frozen_comes_back_bit_for_bit_and_the_rest_moves(host, kinds):
    adapter = train(host, start(host)).adapter

    trained = train(host, adapter, trainable=frozenset(kinds)).adapter

    for name, tensor in adapter.tensors().items():
        kind = "head" if name.startswith("head.") else name[-1]
        assert torch.equal(tensor, trained.tensors()[name]) == (kind not in kinds), name


def test_first_step_from_b_zero_moves_only_b_and_the_head(host):
    """The gradient of A is s B^T G, which is zero while B is (FSLoRA's specification, 1.12, test 6)."""
    adapter = start(host)

    trained = train(host, adapter, settings=SETTINGS.model_copy(update={"steps": 1})).adapter

    for module, pair in trained.factors.items():
        assert torch.equal(adapter.factors[module].A, pair.A)
        assert pair.B.abs().max() > 0


def test_a_penalty_pulls_towards_what_it_names(host):
    """With orthogonality the Gram matrix of A's rows ends nearer to a diagonal than without."""
    adapter = train(host, start(host, rank=4)).adapter

    def off_diagonal(trained):
        grams = [pair.A @ pair.A.T for pair in trained.adapter.factors.values()]
        return sum(float((gram - gram.diagonal().diag()).square().sum()) for gram in grams)

    free = train(host, adapter)
    held = train(host, adapter, penalty=Penalty(name="orthogonality", weight=1.0))

    assert off_diagonal(held) < 0.8 * off_diagonal(free)


def test_weight_decay_and_sgd_are_what_torch_says(host):
    """One SGD step with decay only on the head: w - lr (g + wd w), against plain autograd."""
    adapter = start(host)
    settings = TrainingSection(
        optimizer="sgd", learning_rate=0.1, weight_decay=0.5, batch_size=4, steps=1, max_grad_norm=None
    )
    (indices,) = list(batches(DATA.clients["c0"], settings, seed=1))
    host.wear(adapter, trainable=frozenset({"head"}))
    host.model.zero_grad()
    host.model(**collate(DATA, indices)).loss.backward()
    (parameter,) = host.head_parameters()
    expected = parameter.detach() - 0.1 * (parameter.grad + 0.5 * parameter.detach())

    trained = train(host, adapter, settings=settings, trainable=frozenset({"head"}))

    torch.testing.assert_close(trained.adapter.head["score.weight"], expected)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_micro_batches_change_nothing_but_rounding(task, tmp_path):
    """Parts weigh by what the loss is a mean over, so that short examples count as they do in the whole batch."""
    data = make_data(task=task)
    experiment = make_experiment(save_llama(tmp_path / "llama"), data={"task": task})
    host = AdapterHost(assemble(experiment, data).spec)
    adapter, penalty = start(host), Penalty(name="orthogonality", weight=0.1)
    whole = train(host, adapter, data=data, settings=SETTINGS, penalty=penalty)

    for size in (1, 3, 4, 16):
        settings = SETTINGS.model_copy(update={"micro_batch_size": size})
        parts = train(host, adapter, data=data, settings=settings, penalty=penalty)
        for name, tensor in whole.adapter.tensors().items():
            torch.testing.assert_close(parts.adapter.tensors()[name], tensor, rtol=1e-3, atol=1e-4)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
        assert size < SETTINGS.batch_size or same(parts.adapter, whole.adapter)


def test_a_linear_schedule_ends_at_zero_and_is_transformers_own(host):
    """Step t of T goes at 1 - t / T: SGD on the head, against torch's optimiser under Transformers' scheduler."""
    adapter = start(host)
    settings = TrainingSection(
        optimizer="sgd", learning_rate=0.1, batch_size=4, steps=4, max_grad_norm=None, schedule="linear"
    )
    host.wear(adapter, trainable=frozenset({"head"}))
    (parameter,) = host.head_parameters()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, 4)
    for indices in batches(DATA.clients["c0"], settings, seed=1):
        optimizer.zero_grad()
        host.model(**collate(DATA, indices)).loss.backward()
        optimizer.step()
        scheduler.step()
    expected = parameter.detach().clone()

    trained = train(host, adapter, settings=settings, trainable=frozenset({"head"}))

    torch.testing.assert_close(trained.adapter.head["score.weight"], expected)
    constant = train(
        host, adapter, settings=settings.model_copy(update={"schedule": "constant"}), trainable=frozenset({"head"})
    )
    assert not torch.allclose(constant.adapter.head["score.weight"], expected)


@pytest.mark.parametrize(("steps", "epochs"), [(None, None), (None, 2.5), (1, None), (7, None), (3, None)])
def test_batches_are_shuffled_passes_over_all_examples(steps, epochs):
    """10 examples in batches of 4 are 3 steps a pass; each pass holds every example once."""
    examples = np.arange(100, 110)
    settings = TrainingSection(batch_size=4, steps=steps, epochs=epochs)

    drawn = list(batches(examples, settings, seed=3))

    wanted = steps or round(3 * (epochs or 1.0))
    assert wanted == len(drawn)
    for start_of_pass in range(0, wanted - 2, 3):
        assert list(examples) == sorted(np.concatenate(drawn[start_of_pass : start_of_pass + 3]))
    again = list(batches(examples, settings, seed=3))
    assert all(np.array_equal(left, right) for left, right in zip(drawn, again, strict=True))
    assert not np.array_equal(np.concatenate(drawn), np.concatenate(list(batches(examples, settings, seed=4))))


def test_a_client_with_fewer_examples_than_a_batch_trains_on_what_it_has():
    drawn = list(batches(np.arange(3), TrainingSection(batch_size=16, steps=4), seed=0))

    assert [len(batch) for batch in drawn] == [3, 3, 3, 3]


def test_activations_that_are_computed_anew_change_nothing(host):
    """Gradient checkpointing, in the pass where they are needed; afterwards the model is as it was."""
    adapter, anew = start(host), SETTINGS.model_copy(update={"gradient_checkpointing": True})
    calls = []
    with host.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1)):
        before, plain = train(host, adapter), len(calls)
        checkpointed, again = train(host, adapter, settings=anew), len(calls) - plain

    assert same(before.adapter, checkpointed.adapter)
    assert again == 2 * plain
    assert same(before.adapter, train(host, adapter).adapter)


def test_an_architecture_that_cannot_compute_anew_is_refused(host, monkeypatch):
    monkeypatch.setattr(type(host.model.get_base_model()), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"key training\.gradient_checkpointing: LlamaForSeq\w+ does not support it"):
        train(host, start(host), settings=SETTINGS.model_copy(update={"gradient_checkpointing": True}))


def test_factors_stay_whole_over_a_base_in_half_precision(tmp_path):
    """They are what is averaged; a classifier's head is trained in the model's dtype, as the documentation says."""
    folder = save_llama(tmp_path / "llama")
    experiment = make_experiment(folder, model={"name": str(folder), "dtype": "bfloat16"})
    half = AdapterHost(assemble(experiment, DATA).spec)
    trained = train(half, start(half))

    frozen = {parameter.dtype for name, parameter in half.model.named_parameters() if "q_proj.base_layer" in name}
    assert frozen == {torch.bfloat16}
    assert {factor.dtype for pair in trained.adapter.factors.values() for factor in (pair.A, pair.B)} == {torch.float32}
    assert {parameter.dtype for parameter in half.head_parameters()} == {torch.bfloat16}
    assert not same(trained.adapter, start(half))
