"""Adapters at rest: what plain PEFT makes of a saved folder is the adapter, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError
from fedloom.platform.peft_format import BaseModel, load_adapter, save_adapter, verify_adapter

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
ROBERTA = RobertaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=40,
    pad_token_id=0,
    is_decoder=True,
)
RANKS = (3, 1, 5, 2, 8, 4, 7)


class SuffixConfig(PretrainedConfig):
    """A model in which the name of a module ends the names of others."""

    model_type = "suffix"


class SuffixModel(PreTrainedModel):
    config_class = SuffixConfig

    def __init__(self, config: SuffixConfig) -> None:
        super().__init__(config)
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "inner": nn.ModuleDict({"proj": nn.Linear(6, 6)})})
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["inner"]["proj"](torch.tanh(self.inner["proj"](torch.tanh(self.proj(x)))))

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks causal models for it."""


AutoConfig.register("suffix", SuffixConfig)
AutoModelForCausalLM.register(SuffixConfig, SuffixModel)


@pytest.fixture(params=["llama-classification", "llama-causal_lm", "roberta-classification", "roberta-causal_lm"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, BaseModel, Adapter]:
    """Return a random model that lies in a folder, what says where, and an adapter of unequal ranks for it."""
    family, task = request.param.split("-")
    return model_in_folder(family, task, tmp_path / "base")


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, BaseModel, Adapter]:
    return model_in_folder("llama", "classification", tmp_path / "base")


def model_in_folder(family: str, task: str, folder: Path) -> tuple[Any, BaseModel, Adapter]:
    config = {"llama": LLAMA, "roberta": ROBERTA}[family]
    torch.manual_seed(0)
    if task == "classification":
        model = AutoModelForSequenceClassification.from_config(type(config)(**(config.to_dict() | {"num_labels": 3})))
    else:
        model = AutoModelForCausalLM.from_config(config)
    model.eval().save_pretrained(folder)
    heads = () if task == "causal_lm" else ("score",) if family == "llama" else ("classifier",)
    base = base_model(folder, task=task, head_modules=heads)
    targets = ("q_proj", "v_proj", "down_proj") if family == "llama" else ("query", "value", "intermediate.dense")
    modules = [name for name, _ in model.named_modules() if name.endswith(targets)]
    head = {name: weight for name, weight in model.named_parameters() if name.startswith(heads or ("-",))}
    return model, base, random_adapter(model, modules, head)


def base_model(folder: Path, **changes: Any) -> BaseModel:
    classes = ("red", "green", "blue") if changes.get("task") == "classification" else ()
    fields = {"task": "causal_lm", "head_modules": ()} | changes
    return BaseModel(
        name="random", path=str(folder), revision=None, num_labels=len(classes) or None, label_names=classes, **fields
    )


def random_adapter(model: Any, modules: list[str], head: dict[str, torch.Tensor], scale: float = 0.7) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for index, module in enumerate(modules):
        d_out, d_in = model.get_submodule(module).weight.shape
        rank = RANKS[index % len(RANKS)]
        factors[module] = Factors(
            B=torch.randn(d_out, rank, generator=generator), A=torch.randn(rank, d_in, generator=generator)
        )
    drawn = {name: torch.randn(weight.shape, generator=generator) for name, weight in head.items()}
    return Adapter(factors=factors, head=drawn, scale=scale)


def install(model: Any, adapter: Adapter) -> None:
    """Put the adapter into the weights by hand: W0 + s B A, and the head in place of the model's."""
    with torch.no_grad():
        for module, factors in adapter.factors.items():
            model.get_submodule(module).weight += adapter.scale * factors.product()
        for name, tensor in adapter.head.items():
            model.get_parameter(name).copy_(tensor)


def same(one: Adapter, other: Adapter) -> bool:
    left, right = one.tensors(), other.tensors()
    return (
        left.keys() == right.keys()
        and one.scale == other.scale
        and all(torch.equal(left[name], right[name]) for name in left)
    )


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_plain_peft_reproduces_the_adapter(case: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """PeftModel.from_pretrained computes with W0 + s B A and the adapter's head, whatever the ranks of its modules."""
    model, base, adapter = case
    tokens = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(2))
    folder = save_adapter(tmp_path / "adapter", adapter, base)
    family = type(model)
    through_peft = PeftModel.from_pretrained(family.from_pretrained(base.path), str(folder))
    with torch.no_grad():
        before = model(tokens).logits
        install(model, adapter)
        torch.testing.assert_close(through_peft(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before, model(tokens).logits, atol=1e-2)
    verify_adapter(folder, adapter, base)


def test_loading_gives_the_same_values_back(case: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """Factors, head and scale survive bit for bit, also a scale that no alpha / r hits exactly."""
    _, base, adapter = case
    for scale in (2, 2.0, 0.7, 1 / 3, 5.37):
        given = replace(adapter, scale=scale)
        assert same(load_adapter(save_adapter(tmp_path / "adapter", given, base)), given)
        verify_adapter(tmp_path / "adapter", given, base)


def test_the_same_adapter_gives_the_same_files(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """Nothing random or dated goes into a folder, and nothing else lies in it."""
    _, base, adapter = llama
    first, second = (save_adapter(tmp_path / name, adapter, base) for name in ("first", "second"))
    assert {file.name for file in first.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all((second / file.name).read_bytes() == file.read_bytes() for file in first.iterdir())


def test_the_layout_is_that_of_peft(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """What PEFT itself saves after loading a folder has the same tensors, and names the same ranks and alphas."""
    model, base, adapter = llama
    ours = save_adapter(tmp_path / "ours", adapter, base)
    PeftModel.from_pretrained(model, str(ours)).save_pretrained(tmp_path / "theirs")
    left, right = (load_file(f / "adapter_model.safetensors") for f in (ours, tmp_path / "theirs"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    left, right = (json.loads((f / "adapter_config.json").read_text()) for f in (ours, tmp_path / "theirs"))
    assert left.keys() == right.keys()
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "task_type", "peft_type", "inference_mode"):
        assert left[name] == right[name]


def test_an_adapter_that_peft_saved_is_read(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """load_adapter reads folders that know nothing of Fedloom; alpha / r is the scale, rank-stabilised or not."""
    model, _, _ = llama
    for stabilised, scale in ((False, 6 / 4), (True, 6 / 2)):
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=stabilised, bias="none"
        )
        wrapped = get_peft_model(AutoModelForSequenceClassification.from_config(model.config), config)
        wrapped.save_pretrained(tmp_path / str(stabilised))
        loaded = load_adapter(tmp_path / str(stabilised))
        layer = wrapped.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
        assert loaded.scale == scale
        assert list(loaded.head) == ["score.weight"]
        assert set(loaded.ranks.values()) == {4}
        assert torch.equal(loaded.factors["model.layers.1.self_attn.q_proj"].A, layer.lora_A["default"].weight)


def test_users_load_a_folder_without_naming_the_base(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """The folder says which base model it belongs to, as the how-to promises."""
    _, base, adapter = llama
    folder = save_adapter(tmp_path / "adapter", adapter, base)
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(model.get_submodule("base_model.model.score").weight, adapter.head["score.weight"])
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label_names"]) == ["red", "green", "blue"]


def test_rank_zero_becomes_rank_one_of_zeros(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """PEFT has no rank 0; a rank of zeros has the same effect, namely none."""
    _, base, adapter = llama
    empty, *others = adapter.factors
    d_out, d_in = adapter.factors[empty].B.shape[0], adapter.factors[empty].A.shape[1]
    nothing = Factors(B=torch.empty(d_out, 0), A=torch.empty(0, d_in))
    given = replace(adapter, factors={**adapter.factors, empty: nothing})
    folder = save_adapter(tmp_path / "adapter", given, base)
    verify_adapter(folder, given, base)
    loaded = load_adapter(folder)
    assert torch.equal(loaded.factors[empty].B, torch.zeros(d_out, 1))
    assert torch.equal(loaded.factors[empty].A, torch.zeros(1, d_in))
    assert all(torch.equal(loaded.factors[name].B, adapter.factors[name].B) for name in others)


def test_views_and_wider_types_are_stored_as_float32(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """A cut of a float64 adapter shares storage with the whole; the file holds just the cut, in float32."""
    _, base, adapter = llama
    wide = Adapter.from_tensors({k: t.double() for k, t in adapter.tensors().items()}, adapter.scale).first(1)
    folder = save_adapter(tmp_path / "adapter", wide, base)
    verify_adapter(folder, wide, base)
    loaded = load_adapter(folder)
    assert set(loaded.ranks.values()) == {1}
    assert {tensor.dtype for tensor in loaded.tensors().values()} == {torch.float32}
    assert same(loaded, adapter.first(1))


@pytest.mark.parametrize(
    "modules", [["proj"], ["inner.proj"], ["proj", "inner.proj"], ["proj", "inner.proj", "inner.inner.proj"]]
)
def test_only_the_named_modules_are_adapted(modules: list[str], tmp_path: Path):
    """PEFT matches listed names by their end; neither targets nor ranks may reach a module that ends alike."""
    torch.manual_seed(0)
    model = SuffixModel(SuffixConfig()).eval()
    model.save_pretrained(tmp_path / "base")
    base = base_model(tmp_path / "base")
    adapter = random_adapter(model, modules, {})
    folder = save_adapter(tmp_path / "adapter", adapter, base)
    verify_adapter(folder, adapter, base)
    through_peft = PeftModel.from_pretrained(SuffixModel.from_pretrained(base.path), str(folder))
    ranks = {
        name.removeprefix("base_model.model."): part.r["default"]
        for name, part in through_peft.named_modules()
        if isinstance(part, LoraLayer)
    }
    assert ranks == adapter.ranks
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    install(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(through_peft.base_model.model(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"] * (1 + 2**-23)}), "q_proj.lora_B differs"),
        (lambda t: t.update({f"{Q}.lora_A.weight": -t[f"{Q}.lora_A.weight"]}), "q_proj.lora_A differs"),
        (lambda t: t["base_model.model.score.weight"].mul_(0), "score.weight differs in 48 of 48"),
        (lambda t: t.pop("base_model.model.score.weight"), "cannot be loaded by PEFT"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "PEFT finds no .*q_proj.lora_A"),
        (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][:1].clone()}), "size mismatch"),
    ],
)
def test_verification_finds_every_changed_tensor(
    llama: tuple[Any, BaseModel, Adapter], tmp_path: Path, change: Callable[..., None], message: str
):
    """One unit in the last place of one factor is enough; the first difference is named."""
    _, base, adapter = llama
    folder = save_adapter(tmp_path / "adapter", adapter, base)
    edit_weights(folder, change)
    with pytest.raises(AdapterError, match=message):
        verify_adapter(folder, adapter, base)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(lora_alpha=c["lora_alpha"] * 1.01), "PEFT scales"),
        (lambda c: c.update(use_rslora=True), "PEFT scales"),
        (lambda c: c["target_modules"].pop(0), "leaves out module"),
        (lambda c: c["target_modules"].append("o_proj"), "also loads module"),
        (lambda c: c.update(task_type="NO_TASK"), "cannot be loaded by PEFT"),
        (lambda c: c.update(target_modules="(.*)*[|]"), "target_modules has the pattern"),
        (lambda c: c.update(exclude_modules="(.*)*[|]"), "exclude_modules has the pattern"),
        (lambda c: c.update(layers_to_transform=[0], layers_pattern=["(.*)*[|]"]), "layers_pattern has the pattern"),
        (lambda c: c["modules_to_save"].append("(.*)*[|]"), "modules_to_save has the pattern"),
        (lambda c: c.update(modules_to_save=[[1]]), "modules_to_save is .*, not patterns"),
    ],
)
def test_verification_finds_every_changed_setting(
    llama: tuple[Any, BaseModel, Adapter], tmp_path: Path, change: Callable[..., None], message: str
):
    """The modules and the scale that PEFT gives each of them are compared, not only the tensors."""
    _, base, adapter = llama
    folder = save_adapter(tmp_path / "adapter", adapter, base)
    edit_config(folder, change)
    with pytest.raises(AdapterError, match=message):
        verify_adapter(folder, adapter, base)


def test_verification_costs_no_base_model_and_no_random_numbers(tmp_path: Path):
    """A base of 7 billion parameters is verified from its configuration alone; no weights exist at all."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    base = base_model(tmp_path / "base")
    factors = {
        f"model.layers.{layer}.self_attn.v_proj": Factors(B=torch.randn(4096, 1), A=torch.randn(1, 4096))
        for layer in range(32)
    }
    adapter = Adapter(factors=factors, head={}, scale=2.0)
    before = torch.get_rng_state()
    verify_adapter(save_adapter(tmp_path / "adapter", adapter, base), adapter, base)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_again_replaces_the_adapter_but_nothing_else(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """A folder is renamed into place as a whole, and one that holds other files is never touched."""
    _, base, adapter = llama
    folder = save_adapter(tmp_path / "adapters" / "final", adapter, base)
    save_adapter(folder, adapter.first(1), base)
    assert set(load_adapter(folder).ranks.values()) == {1}
    assert [entry.name for entry in folder.parent.iterdir()] == ["final"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="something else"):
        save_adapter(folder, adapter, base)
    assert (folder / "notes.txt").read_text() == "mine"
    assert set(load_adapter(folder).ranks.values()) == {1}


def test_an_adapter_of_another_model_is_refused(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """Modules and head tensors must exist in the base model; the nearest name is given."""
    _, base, adapter = llama
    pair = next(iter(adapter.factors.values()))
    for wrong, message in (
        (replace(adapter, factors={"model.layers.0.self_attn.q_projj": pair}), "Did you mean .*q_proj'"),
        (replace(adapter, factors={}), "no factors"),
        (replace(adapter, head={"classifier.weight": torch.zeros(3, 16)}), "'classifier.weight' lies in none"),
        (replace(adapter, head={}), "has no tensors"),
    ):
        with pytest.raises(AdapterError, match=message):
            save_adapter(tmp_path / "adapter", wrong, base)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(peft_type="LOHA"), "peft_type is 'LOHA'"),
        (lambda c: c.update(use_dora=True), "use_dora is True"),
        (lambda c: c.update(lora_alpha=c["lora_alpha"] * 2), "one scale for all modules"),
        (lambda c: c.update(rank_pattern={}), "has rank 8 in adapter_config.json but 5"),
        (lambda c: c.update(r="many", rank_pattern={}), "no rank and alpha"),
    ],
)
def test_a_folder_that_is_no_plain_lora_adapter_is_refused(
    llama: tuple[Any, BaseModel, Adapter], tmp_path: Path, change: Callable[..., None], message: str
):
    """Whatever an Adapter cannot hold is refused by name."""
    _, base, adapter = llama
    folder = save_adapter(tmp_path / "adapter", adapter, base)
    edit_config(folder, change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


def test_a_broken_folder_is_refused_in_one_line(llama: tuple[Any, BaseModel, Adapter], tmp_path: Path):
    """Absent and damaged files, foreign tensors and lonely factors are errors that name the file."""
    _, base, adapter = llama
    with pytest.raises(AdapterError, match="is no adapter folder"):
        load_adapter(tmp_path / "nowhere")
    folder = save_adapter(tmp_path / "adapter", adapter, base)
    edit_weights(folder, lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(1)}))
    with pytest.raises(AdapterError, match="no plain LoRA layer"):
        load_adapter(folder)
    folder = save_adapter(folder, adapter, base)
    edit_weights(folder, lambda t: t.pop(f"{Q}.lora_A.weight"))
    with pytest.raises(AdapterError, match="q_proj' has one factor without the other"):
        load_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(folder)
