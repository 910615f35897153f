"""Adapters in PEFT's format that came from anywhere, to be merged: what they say of themselves, and whether they fit.

In PEFT every adapter, and every module in it, may have a scale of its own (alpha / r, or alpha / sqrt(r)); here
adapters that are merged have one. What a module's scale differs by is multiplied into its B: A, which clients often
share since they began from the same draw, stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError, clipped
from fedloom.platform.peft_layout import CONFIG_NAME, WEIGHTS_NAME, Origin, scales_agree
from fedloom.platform.peft_read import factors_and_head, module_scales, read_config, read_tensors
from fedloom.platform.updates import unusable

PICKLE_NAME = "adapter_model.bin"
# Variants of LoRA of which a folder's factors are not the whole: beside those that no reader here takes.
VARIANTS = ("use_qalora", "alora_invocation_tokens", "monteclora_config", "arrow_config", "kasa_config", "use_bdlora")
# The other ways to begin change the base weights too, and do it again when the adapter is loaded.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignAdapter:
    """What a folder says of its adapter. The values stay on the disk until they are asked for.

    Attributes:
        folder: where it lies.
        factors: by module, on the device ``meta``: shapes alone.
        head: the tensors that are stored in full, likewise.
        scales: what each module's product is multiplied with.
        origin: the model that it belongs to.
    """

    folder: Path
    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor]
    scales: Mapping[str, float]
    origin: Origin

    @property
    def ranks(self) -> dict[str, int]:
        """The rank by module."""
        return {module: pair.rank for module, pair in self.factors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by module."""
        return {module: (pair.B.shape[0], pair.A.shape[1]) for module, pair in self.factors.items()}

    def read(self, scale: float) -> Adapter:
        """Read the values, in float32: an adapter of this scale with the products that the folder's own model has.

        Raises:
            AdapterError: the folder has changed, or a value is not finite or so large that sums of it would not be.
        """
        factors, head = factors_and_head(self.folder, read_tensors(self.folder)[0])
        found = Adapter(factors=factors, head=head, scale=scale)
        told = Adapter(factors=self.factors, head=self.head, scale=scale)
        if _shapes_of(found) != _shapes_of(told):
            raise AdapterError(f"{clipped(self.folder)} has changed since it was looked at")
        for module, pair in factors.items():
            if not scales_agree(self.scales[module], scale):
                factors[module] = Factors(B=pair.B * (self.scales[module] / scale), A=pair.A)
        reason = unusable(found.tensors())
        if reason is not None:
            raise AdapterError(f"{clipped(self.folder)}: {reason.reason}")
        return found


def look_at(folder: Path) -> ForeignAdapter:
    """Read what an adapter's folder says: its configuration and the header of its weights.

    Raises:
        AdapterError: it is no such folder, holds a pickle in place of safetensors, or its adapter is no plain LoRA.
    """
    config = read_config(folder)
    if (folder / PICKLE_NAME).exists() and not (folder / WEIGHTS_NAME).exists():
        raise AdapterError(
            f"{clipped(folder)} has its weights in {PICKLE_NAME}, a pickle, which runs code when it is read. "
            f"Save the adapter as safetensors: peft_model.save_pretrained(folder) writes {WEIGHTS_NAME}."
        )
    factors, head = factors_and_head(folder, read_tensors(folder, values=False)[0])
    _check_plain(folder, config)
    return ForeignAdapter(
        folder=folder,
        factors=factors,
        head=head,
        scales=module_scales(folder, config, factors),
        origin=_origin(folder, config, head),
    )


def check_alike(adapters: Sequence[ForeignAdapter]) -> None:
    """See whether adapters can be of one model.

    Raises:
        AdapterError: one has another module, tensor of the head, shape or kind of model than the first; names both.
    """
    first = adapters[0]
    for other in adapters[1:]:
        place = f"{clipped(other.folder)} does not fit {clipped(first.folder)}"
        for what, known, found in (
            ("module", first.factors.keys(), other.factors.keys()),
            ("trained tensor", first.head.keys(), other.head.keys()),
        ):
            alone = min(known ^ found, default=None)
            if alone is not None:
                holder = clipped(first.folder if alone in known else other.folder)
                raise AdapterError(f"{place}: {what} {clipped(repr(alone))} is in {holder} alone")
        shapes = other.shapes
        for module, shape in first.shapes.items():
            if shapes[module] != shape:
                said = f"{clipped(repr(module))} changes a weight of {shapes[module]}, there one of {shape}"
                raise AdapterError(f"{place}: {said}; d_out and d_in must agree")
        for name, tensor in first.head.items():
            if other.head[name].shape != tensor.shape:
                said = f"{clipped(repr(name))} has the shape {tuple(other.head[name].shape)}"
                raise AdapterError(f"{place}: {said}, there {tuple(tensor.shape)}")
        for key in ("task_type", "fan_in_fan_out"):
            one, two = getattr(first.origin, key), getattr(other.origin, key)
            if one != two:
                raise AdapterError(f"{place}: {key} is {two!r} in its {CONFIG_NAME}, there {one!r}")


def common_scale(adapters: Sequence[ForeignAdapter]) -> float:
    """Return the scale of all modules of all adapters; 1 where they have several, or none but 0."""
    scales = [scale for adapter in adapters for scale in adapter.scales.values()]
    return scales[0] if scales[0] and all(scales_agree(scale, scales[0]) for scale in scales) else 1.0


def _shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    place = clipped(folder / CONFIG_NAME)
    for option in VARIANTS:
        if config.get(option):
            raise AdapterError(f"{place}: {option} is set; only plain LoRA can be merged")
    bias, start = config.get("bias", "none"), config.get("init_lora_weights", True)
    if bias != "none":
        raise AdapterError(f"{place}: bias is {clipped(repr(bias))}; only 'none' can be merged")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in PLAIN_STARTS):
        raise AdapterError(
            f"{place}: init_lora_weights is {clipped(repr(start))}, which changes the base weights as well. Save the "
            "adapter with path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )


def _origin(folder: Path, config: Mapping[str, Any], head: Mapping[str, Tensor]) -> Origin:
    from peft import TaskType

    place = clipped(folder / CONFIG_NAME)
    texts = {key: config.get(key) for key in ("task_type", "base_model_name_or_path", "revision")}
    for key, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise AdapterError(f"{place}: {key} is {clipped(repr(text))}, not a text")
    kinds = [kind.value for kind in TaskType]
    if texts["task_type"] not in (None, *kinds):
        raise AdapterError(f"{place}: task_type is {clipped(repr(texts['task_type']))}; allowed are {', '.join(kinds)}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise AdapterError(f"{place}: modules_to_save is {clipped(repr(saved))}, not a list of names")
    owned = {module: [name for name in head if f".{module}." in f".{name}"] for module in saved}
    loose = sorted(set(head).difference(*owned.values()))
    if loose:
        raise AdapterError(
            f"{clipped(folder / WEIGHTS_NAME)}: tensor {clipped(repr(loose[0]))} belongs to no LoRA layer and to no "
            "module of modules_to_save, so it is not known how it counts"
        )
    return Origin(
        task_type=texts["task_type"],
        base_model=texts["base_model_name_or_path"],
        revision=texts["revision"],
        head_modules=tuple(module for module, names in owned.items() if names),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )
