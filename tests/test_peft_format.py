"""Adapters at rest: what plain PEFT makes of a saved folder is the adapter, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from saved import base_model, install, model_in_folder, random_adapter, same
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.peft_format import BaseModel, load_adapter, save_adapter, verify_adapter


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
