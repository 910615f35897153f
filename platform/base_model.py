"""Loading a base model and its tokenizer: `builtin:tiny`, a hub id or a local folder; decoders and encoders."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.platform.errors import ModelError, nearest, unknown
from fedloom.platform.experiment import Experiment
from fedloom.platform.quantization import quantized_arguments

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
BUILTIN_MODELS = ("builtin:tiny",)
GIVE = "Give a folder that save_pretrained wrote, a hub id such as 'org/model', or 'builtin:tiny'."
HEAD_MODULES = ("score", "classifier", "classification_head")  # what transformers calls the heads of its classifiers


def model_path(name: str) -> str:
    """Return what ``from_pretrained`` is given for a model's name.

    Raises:
        ModelError: an unknown builtin model, or a folder without a model in it.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN_MODELS:
            raise ModelError(f"key model.name: {unknown('builtin model', name, BUILTIN_MODELS)}")
        return str(BUILTIN_FOLDER / name.removeprefix("builtin:"))
    folder = Path(name).expanduser()
    if is_local_model(name) and not (folder / "config.json").is_file():
        raise ModelError(f"key model.name: {name!r} is no model folder (it has no config.json). {GIVE}")
    return str(folder.resolve()) if is_local_model(name) else name


def is_local_model(name: str) -> bool:
    """Whether a model's name means a folder, and neither a hub id nor a builtin model."""
    return name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything a process needs to build the base model with its LoRA layers.

    Attributes:
        path: what ``from_pretrained`` is given.
        label_names: the classes; empty for ``causal_lm``.
        pad_token_id: the token that fills up batches.
        quantization: of the weights on a device, see :mod:`fedloom.platform.quantization`.
    """

    path: str
    revision: str | None
    dtype: str
    task: str
    label_names: tuple[str, ...]
    pad_token_id: int
    targets: tuple[str, ...] | None
    dropout: float
    quantization: str = "none"

    @staticmethod
    def of(experiment: Experiment, *, label_names: tuple[str, ...], pad_token_id: int) -> "ModelSpec":
        """Take the model's part of an experiment, with what its data decides."""
        return ModelSpec(
            path=model_path(experiment.model.name),
            revision=experiment.model.revision,
            dtype=experiment.model.dtype,
            quantization=experiment.model.quantization,
            task=experiment.data.task,
            label_names=label_names,
            pad_token_id=pad_token_id,
            targets=experiment.adapter.targets,
            dropout=experiment.adapter.dropout,
        )


def load_tokenizer(experiment: Experiment) -> Any:
    """Load the base model's tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    return _tokenizer(model_path(experiment.model.name), experiment.model.revision, experiment.model.name)


def tokenizer_of(spec: ModelSpec) -> Any:
    """Load the tokenizer that belongs to a base model.

    Raises:
        ModelError: it cannot be loaded.
    """
    return _tokenizer(spec.path, spec.revision, spec.path)


def _tokenizer(path: str, revision: str | None, name: str) -> Any:
    with quiet_transformers(), _explained(name, "tokenizer"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, revision=revision)


def context_length(spec: ModelSpec) -> int | None:
    """Return how many tokens the model says that it can read, if it says so.

    Raises:
        ModelError: its configuration cannot be loaded.
    """
    with quiet_transformers(), _explained(spec.path, "model"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(spec.path, revision=spec.revision).get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return None if length is None else int(length)


def load_base_model(spec: ModelSpec, *, device: str) -> tuple[Any, frozenset[str]]:
    """Load the base model in evaluation mode, and name the parameters that its checkpoint lacks (a new head).

    On the device ``meta`` only the architecture is built, from the configuration: shapes without weights.

    Raises:
        ModelError: it cannot be loaded.
        MachineError: its weights are to be quantized, and this machine cannot.
    """
    quantized = (
        quantized_arguments(spec.quantization, spec.dtype, device, whole=HEAD_MODULES) if device != "meta" else {}
    )
    with quiet_transformers(), _explained(spec.path, "model"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        labels = {"num_labels": len(spec.label_names)} if spec.task == "classification" else {}
        config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, **labels)
        config.pad_token_id = spec.pad_token_id
        if spec.label_names:
            config.id2label = dict(enumerate(spec.label_names))
            config.label2id = {name: index for index, name in enumerate(spec.label_names)}
        family = AutoModelForSequenceClassification if spec.task == "classification" else AutoModelForCausalLM
        if device == "meta":
            with torch.device("meta"):
                return family.from_config(config), frozenset()
        model, info = family.from_pretrained(
            spec.path,
            revision=spec.revision,
            config=config,
            dtype=getattr(torch, spec.dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,  # other formats are pickles
            **quantized,
        )
    missing = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    strange = sorted(name for name in missing if not _is_head(name))
    if strange:
        raise ModelError(
            f"key model.name: the checkpoint in {spec.path!r} lacks {len(strange)} weights of the base model, "
            f"e.g. {strange[0]!r}; only a classifier head may be new"
        )
    if not quantized:  # weights that are quantized lie on their device already
        model.to(device)
    return model.eval(), frozenset(missing)


@contextlib.contextmanager
def checkpointing(model: Any, *, reentrant: bool = False) -> Iterator[None]:
    """Let a model's backward passes compute activations anew, layer by layer.

    Args:
        model: PEFT's wrapper around it.
        reentrant: by PyTorch's older way, which also bears weights that are gone between the passes.

    Raises:
        ModelError: its architecture cannot.
    """
    base = model.get_base_model()
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"key training.gradient_checkpointing: {type(base).__name__} does not support it. Set it to false; a "
            "smaller training.micro_batch_size saves memory too."
        )
    with warnings.catch_warnings():
        # Transformers 5.23 calls it activation checkpointing; older releases do not know that name.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            base.enable_input_require_grads()  # or nothing would be learnt: the older way looks at its inputs alone
        try:
            yield
        finally:
            if reentrant:
                base.disable_input_require_grads()
            base.gradient_checkpointing_disable()


def _is_head(name: str) -> bool:
    return name.split(".", 1)[0] in HEAD_MODULES


@contextlib.contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a wrong name, an absent file or a closed network into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"key model.name: the {what} {name!r} cannot be loaded: {reason}{_instead(name)}") from error


def _instead(name: str) -> str:
    """Say what may stand in place of a name that was taken for a hub id: perhaps a folder was meant."""
    if is_local_model(name):
        return ""
    folders = [file.parent.name for file in Path().glob("*/config.json")]
    return f"{nearest(name, folders)} {GIVE} A folder and 'builtin:tiny' need no network."


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and load reports off the user's terminal: what matters is reported by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft reads a property that transformers has renamed; neither is ours to change.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
