"""One base model wears any adapter, over any patch, and leaves no trace of those it wore before."""

import pytest
import torch
from small import PAD, save_llama, save_roberta

from fedloom.platform.adapter import Adapter, Factors, Patch, Template, compose, initial_adapter
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import ModelSpec
from fedloom.platform.errors import ModelError

LABELS = ("x", "y", "z")


@pytest.fixture(scope="module", params=["llama-classification", "llama-causal_lm", "roberta-classification"])
def host(request, tmp_path_factory):
    architecture, task = request.param.split("-")
    save = save_llama if architecture == "llama" else save_roberta
    folder = save(tmp_path_factory.mktemp(architecture) / "model")
    return AdapterHost(spec_for(folder, task))


def spec_for(folder, task="classification", targets=None):
    return ModelSpec(
        path=str(folder),
        revision=None,
        dtype="float32",
        task=task,
        label_names=LABELS if task == "classification" else (),
        pad_token_id=PAD,
        targets=targets,
        dropout=0.0,
    )


def trained(host, rank, seed):
    """An adapter that changes the model: no factor is zero."""
    template = Template(shapes=host.shapes, head=host.initial_head(0), rank=rank, scale=2.0)
    generator = torch.Generator().manual_seed(seed)
    start = initial_adapter(template, generator)
    factors = {
        module: Factors(B=torch.randn(pair.B.shape, generator=generator) / 4, A=pair.A)
        for module, pair in start.factors.items()
    }
    return Adapter(factors=factors, head=start.head, scale=start.scale)


def logits(host):
    tokens = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return host.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def test_the_effect_is_w0_plus_scale_b_a(host):
    """Against the obvious way: add s B A to the weights by hand and wear an adapter that does nothing."""
    adapter = trained(host, 3, seed=1)
    zero = initial_adapter(
        Template(shapes=host.shapes, head=adapter.head, rank=1, scale=2.0), torch.Generator().manual_seed(0)
    )
    host.wear(adapter)
    worn = logits(host)

    host.wear(zero)
    plain = logits(host)
    weights = {
        name.removeprefix("base_model.model."): part.base_layer.weight
        for name, part in host.model.named_modules()
        if hasattr(part, "base_layer")
    }
    with torch.no_grad():
        for module, pair in adapter.factors.items():
            weights[module].add_(2.0 * pair.product())
        merged = logits(host)
        for module, pair in adapter.factors.items():
            weights[module].sub_(2.0 * pair.product())

    torch.testing.assert_close(worn, merged, atol=1e-5, rtol=1e-5)
    assert (worn - plain).abs().max() > 20 * (worn - merged).abs().max()


@pytest.mark.parametrize("rank", [0, 1, 2, 5, 8])
def test_what_is_worn_comes_back_bit_for_bit_at_any_rank(host, rank):
    adapter = trained(host, rank, seed=rank)

    host.wear(adapter, trainable=frozenset({"A", "B", "head"}))
    back = host.worn(adapter.scale)

    assert adapter.tensors().keys() == back.tensors().keys()
    assert all(torch.equal(tensor, back.tensors()[name]) for name, tensor in adapter.tensors().items())


def test_adapters_worn_before_leave_no_trace(host):
    adapter, other = trained(host, 2, seed=1), trained(host, 6, seed=2)
    host.wear(adapter)
    first = logits(host)

    host.wear(other, patch=trained(host, 3, seed=3).factors, patch_scale=2.0)
    logits(host)
    host.wear(adapter)

    assert torch.equal(first, logits(host))


def test_a_patch_beside_an_adapter_equals_the_two_composed(host):
    own, change = trained(host, 2, seed=1), trained(host, 3, seed=2)
    patch = Patch(scale=2.0).appended(change.first(1).factors)
    rest = {module: Factors(B=pair.B[:, 1:], A=pair.A[1:]) for module, pair in change.factors.items()}
    patch = patch.appended(rest)
    host.wear(own, patch=patch.factors(), patch_scale=2.0)
    beside = logits(host)

    host.wear(compose(own, patch))

    torch.testing.assert_close(beside, logits(host), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", [{"A"}, {"B"}, {"head"}, {"A", "B", "head"}, set()])
def test_only_what_the_dispatch_names_gets_gradients(host, kinds):
    """The base model and a patch never do."""
    adapter = trained(host, 2, seed=1)
    host.wear(adapter, patch=adapter.factors, patch_scale=2.0, trainable=frozenset(kinds))

    factors = len(host.shapes) * (("A" in kinds) + ("B" in kinds))
    head = len(adapter.head) * ("head" in kinds)

    assert factors == len(host.factor_parameters())
    assert head == len(host.head_parameters())
    assert factors + head == sum(parameter.requires_grad for parameter in host.model.parameters())


def test_a_new_head_comes_from_the_seed_alone(host):
    first, again, other = host.initial_head(1), host.initial_head(1), host.initial_head(2)

    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    matrices = [name for name, tensor in first.items() if tensor.ndim > 1]
    assert all(not torch.equal(first[name], other[name]) for name in matrices)


def test_the_meta_device_knows_the_same_shapes(tmp_path):
    folder = save_llama(tmp_path / "model")

    real, meta = AdapterHost(spec_for(folder)), AdapterHost(spec_for(folder), device="meta")

    assert real.shapes == meta.shapes
    assert real.head_modules == meta.head_modules


def test_a_head_in_the_checkpoint_is_kept(tmp_path):
    """A fine-tuned classifier starts from its own head, not from a new one."""
    from transformers import LlamaForSequenceClassification

    folder = tmp_path / "classifier"
    model = LlamaForSequenceClassification.from_pretrained(save_llama(tmp_path / "base"), num_labels=3)
    model.save_pretrained(folder)

    host = AdapterHost(spec_for(folder))

    assert torch.equal(model.score.weight, host.initial_head(7)["score.weight"])


def test_unknown_targets_are_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ModelError, match=r"has no such modules \(q_prj\)\. Did you mean 'q_proj'\?.*gate_proj"):
        AdapterHost(spec_for(save_llama(tmp_path / "model"), targets=("q_prj",)))


def test_a_folder_without_a_model_is_refused(tmp_path):
    from fedloom.platform.base_model import model_path

    with pytest.raises(ModelError, match=r"has no config\.json"):
        model_path(str(tmp_path))
    with pytest.raises(ModelError, match="Did you mean 'builtin:tiny'"):
        model_path("builtin:tiney")
