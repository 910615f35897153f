"""A base model that wears one adapter after another.

PEFT injects its LoRA layers once. After that an adapter of any rank is put on by replacing the factors' parameters:
nothing is injected again for a client. A patch of the base weights is worn as a second, frozen PEFT adapter: it is
never merged into the weights, so that results do not depend on which adapters a process has worn before.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.base_model import HEAD_MODULES, ModelSpec, load_base_model
from fedloom.platform.injection import OWN, head_modules, lora_layers, with_lora_layers
from fedloom.platform.penalties import Pair
from fedloom.platform.seeds import generator_for
from fedloom.platform.shared_model import SharedModel
from fedloom.platform.ties import Tie
from fedloom.platform.trained_layers import CoredFactor, TiedA, TiedB

PATCH = "patch"


class AdapterHost:
    """One base model on one device, with LoRA layers in its target modules."""

    def __init__(self, spec: ModelSpec, *, device: str = "cpu", base: SharedModel | None = None) -> None:
        """Load the base model, or build it from ``base`` if that is given, and inject the layers.

        Raises:
            ModelError: the model cannot be loaded, or has no target modules of these names.
        """
        self.spec = spec
        self.device = device
        built = load_base_model(spec, device=device) if base is None else base.build(device=device)
        self._missing = built[1]
        self.model = with_lora_layers(built[0], spec)
        self._layers = lora_layers(self.model)
        self._heads = head_modules(self.model)
        self._has_patch = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by target module."""
        return {name: (layer.out_features, layer.in_features) for name, layer in self._layers.items()}

    @property
    def head_modules(self) -> tuple[str, ...]:
        """The modules that are trained in full."""
        return tuple(self._heads)

    @property
    def num_parameters(self) -> int:
        """Parameters of the base model, without LoRA layers and copies of the head."""
        return sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if "lora_" not in name and "modules_to_save" not in name
        )

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the base model's linear layers, which every token is multiplied with: no embeddings, no LoRA."""
        from transformers.pytorch_utils import Conv1D

        return sum(
            module.weight.numel()
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in name and "modules_to_save" not in name
        )

    @property
    def num_quantizable_parameters(self) -> int:
        """Weights of the linear layers that ``model.quantization`` is about: neither the head nor the output layer."""
        return sum(
            module.weight.numel()
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not any(part in name for part in ("lora_", "lm_head", *HEAD_MODULES))
        )

    @property
    def num_head_parameters(self) -> int:
        """Values of the modules that are trained in full."""
        return sum(parameter.numel() for parameter in self._head_parameters().values())

    def initial_head(self, seed: int) -> dict[str, Tensor]:
        """Return the head before round 0: the checkpoint's, or drawn from ``seed`` where the checkpoint has none.

        Drawn weights are normal with the configuration's ``initializer_range``; biases are zero.
        """
        spread = float(getattr(self.model.config, "initializer_range", 0.02))
        head = {}
        for name, parameter in self._head_parameters().items():
            value = parameter.detach().float().cpu().clone()
            if name in self._missing:
                generator = generator_for(seed, "head", name)
                value = torch.empty_like(value)
                value = value.normal_(0, spread, generator=generator) if value.ndim > 1 else value.zero_()
            head[name] = value
        return head

    def wear(
        self,
        adapter: Adapter,
        *,
        patch: Mapping[str, Factors] | None = None,
        patch_scale: float = 1.0,
        trainable: frozenset[str] = frozenset(),
        ties: Mapping[str, Tie] | None = None,
    ) -> None:
        """Put on an adapter (copied), over a patch if there is one; only the kinds in ``trainable`` get gradients.

        Factors for which there is a tie are made of one matrix G from then on.
        """
        if patch and not self._has_patch:
            self._add_patch_layers()
        for name, layer in self._layers.items():
            self._set(layer, OWN, adapter.factors[name], adapter.scale, (ties or {}).get(name))
            if patch:
                self._set(layer, PATCH, patch[name], patch_scale)
            # Activating a PEFT adapter makes all its factors trainable, so what is frozen is said afterwards.
            layer.set_adapter([OWN, PATCH] if patch else [OWN])
            self._freeze(layer, OWN, trainable)
            if patch:
                self._freeze(layer, PATCH, frozenset())
        for name, parameter in self._head_parameters().items():
            new = adapter.head[name].to(self.device, parameter.dtype, copy=True)
            self._replace_head_parameter(name, nn.Parameter(new, requires_grad="head" in trainable))

    def worn(self, scale: float) -> Adapter:
        """Return the adapter as it is now: float32 copies on the CPU, with the scale that it was sent with."""
        factors = {
            name: _held(layer.lora_B[OWN], _copied(layer.lora_A[OWN].weight)) for name, layer in self._layers.items()
        }
        head = {name: _copied(parameter) for name, parameter in self._head_parameters().items()}
        return Adapter(factors=factors, head=head, scale=scale)

    def pairs(self) -> list[Pair]:
        """Return the live (B, A) of every module, for penalties."""
        return [(layer.lora_B[OWN].weight, layer.lora_A[OWN].weight) for layer in self._layers.values()]

    def factor_parameters(self) -> list[nn.Parameter]:
        """Return the trainable factors."""
        holders = [holder for layer in self._layers.values() for holder in (layer.lora_B[OWN], layer.lora_A[OWN])]
        return [factor for holder in holders for factor in holder.parameters() if factor.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the trainable head."""
        return [parameter for parameter in self._head_parameters().values() if parameter.requires_grad]

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{module}.{name}": parameter
            for module, wrapper in self._heads.items()
            for name, parameter in wrapper.modules_to_save[OWN].named_parameters()
        }

    def _replace_head_parameter(self, name: str, new: nn.Parameter) -> None:
        module = next(module for module in self._heads if name.startswith(f"{module}."))
        inner, _, last = name.removeprefix(f"{module}.").rpartition(".")
        setattr(self._heads[module].modules_to_save[OWN].get_submodule(inner), last, new)

    def _set(self, layer: Any, slot: str, factors: Factors, scale: float, tie: Tie | None = None) -> None:
        """Put the factors into one PEFT adapter of a layer, whose linear layers others take the place of if need be."""
        layer.scaling[slot] = scale
        if tie is not None:
            G = self._parameter(tie.untied(factors.A))
            layer.lora_A[slot], layer.lora_B[slot] = TiedA(G, tie), TiedB(G, tie)
            return
        if not isinstance(layer.lora_A[slot], nn.Linear):
            layer.lora_A[slot] = nn.Linear(1, 1, bias=False, device=self.device)
        layer.lora_A[slot].weight = self._parameter(factors.A)
        if factors.C is not None:
            layer.lora_B[slot] = CoredFactor(self._parameter(factors.B), self._parameter(factors.C))
            return
        if not isinstance(layer.lora_B[slot], nn.Linear):
            layer.lora_B[slot] = nn.Linear(1, 1, bias=False, device=self.device)
        layer.lora_B[slot].weight = self._parameter(factors.B)

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(self.device, torch.float32, copy=True))

    @staticmethod
    def _freeze(layer: Any, slot: str, trainable: frozenset[str]) -> None:
        first, last = layer.lora_A[slot], layer.lora_B[slot]
        if isinstance(first, TiedA):
            first.G.requires_grad_("G" in trainable)
            return
        first.weight.requires_grad_("A" in trainable)
        last.weight.requires_grad_("B" in trainable)
        if isinstance(last, CoredFactor):
            last.core.requires_grad_("C" in trainable)
            last.gain.requires_grad_("gain" in trainable)

    def _add_patch_layers(self) -> None:
        from peft import LoraConfig

        self.model.peft_config[PATCH] = LoraConfig(r=1, target_modules=list(self._layers), lora_dropout=0.0)
        self.model.base_model.inject_adapter(self.model.base_model.model, PATCH)
        self._has_patch = True


def _held(last: nn.Module, A: Tensor) -> Factors:
    """Return what a layer holds: its B, with the core if it has one, and A."""
    if isinstance(last, CoredFactor):
        return Factors(B=_copied(last.weight), A=A, C=_copied(last.folded_core()))
    return Factors(B=_copied(cast(Tensor, last.weight)), A=A)


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
