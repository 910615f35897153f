"""Little base models in folders, adapters for them, and what a hand does to a saved adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    RobertaConfig,
)

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.peft_format import BaseModel

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


Q = "base_model.model.model.layers.0.self_attn.q_proj"
