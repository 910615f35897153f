"""Adapters that are not saved, not read, or not what was saved: each is found and named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import Q, base_model, edit_config, edit_weights, model_in_folder
from transformers import (
    LlamaConfig,
)

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError
from fedloom.platform.peft_format import BaseModel, load_adapter, save_adapter, verify_adapter


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, BaseModel, Adapter]:
    return model_in_folder("llama", "classification", tmp_path / "base")


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
