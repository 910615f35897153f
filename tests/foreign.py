"""Adapters that PEFT wrote for clients of their own, and what ``fedloom aggregate`` makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import saved
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from typer.testing import CliRunner

from fedloom.jobs.main import app

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"
# Alphas, ranks and what PEFT makes of them differ between all three, and in the third one between modules.
UNEQUAL = {
    "one": {"r": 4, "lora_alpha": 8},
    "two": {"r": 2, "lora_alpha": 6, "use_rslora": True},
    "three": {"r": 3, "lora_alpha": 5, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"1.self_attn.v_proj": 9}},
}
EXAMPLES = (120, 80, 7)


@dataclass(frozen=True)
class Clients:
    """Folders that PEFT wrote, and the changes of the weights that PEFT itself makes of them, in float64."""

    folders: tuple[Path, ...]
    products: tuple[Mapping[str, torch.Tensor], ...]

    def mean(self, examples: Sequence[int] = EXAMPLES) -> dict[str, torch.Tensor]:
        shares = [count / sum(examples) for count in examples]
        return {
            module: sum(share * one[module] for share, one in zip(shares, self.products, strict=True))
            for module in self.products[0]
        }


def model_of(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind is GPT2LMHeadModel:
        return kind(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    labels = {"num_labels": 3} if kind is LlamaForSequenceClassification else {}
    return kind(LlamaConfig(**LLAMA, **labels)).eval()


def products_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what PEFT adds to each weight, as it lies in memory, in float64."""
    changes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            pair = [part["default"].weight.detach().double() for part in (layer.lora_B, layer.lora_A)]
            product = layer.scaling["default"] * pair[0] @ pair[1]
            changes[name.removeprefix("base_model.model.")] = product.T if layer.fan_in_fan_out else product
    return changes


def train(folder: Path, kind: type[PreTrainedModel], seed: int, **options: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors and head, and return its products."""
    options = {"task_type": "CAUSAL_LM", "target_modules": TARGETS} | options
    model = get_peft_model(model_of(kind), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return products_of(model)


def trained(folder: Path, clients: Mapping[str, Mapping[str, Any]], **common: Any) -> Clients:
    products = [
        train(folder / name, LlamaForCausalLM, seed, **common, **options)
        for seed, (name, options) in enumerate(clients.items())
    ]
    return Clients(tuple(folder / name for name in clients), tuple(products))


def aggregate(*arguments: object, examples: Sequence[object] = EXAMPLES) -> Any:
    return CliRunner().invoke(app, ["aggregate", *map(str, arguments), "--examples", *map(str, examples)])


def merged(out: Path, clients: Clients, *arguments: object, examples: Sequence[int] = EXAMPLES) -> Path:
    done = aggregate(*clients.folders, "-o", out, "--method", *arguments, examples=examples)
    assert done.exit_code == 0, done.output
    return out


def loaded(folder: Path, kind: type[PreTrainedModel] = LlamaForCausalLM) -> PeftModel:
    return PeftModel.from_pretrained(model_of(kind), str(folder)).eval()


def apart(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def edit_config(folder: Path, **changes: Any) -> None:
    saved.edit_config(folder, lambda config: config.update(changes))


def without(tensors: dict[str, torch.Tensor], module: str) -> None:
    for factor in "AB":
        tensors.pop(f"base_model.model.{module}.lora_{factor}.weight")
