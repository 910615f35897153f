"""A store for runs, what it says of one, and what a run with an adapter needs: a base model in a folder."""

import urllib.parse
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from transformers import LlamaConfig

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.peft_format import BaseModel
from fedloom.platform.tracking import Tracking


def default_store(place: Path) -> Tracking:
    """Make the store that is used without a word in a working directory, which may be a new one."""
    place.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return Tracking(None)


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    return [entry.path for entry in client.list_artifacts(run_id, folder)]


def local(client: MlflowClient, run_id: str, path: str) -> Path:
    uri = client.get_run(run_id).info.artifact_uri
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path)) / path


def base_in(folder: Path) -> BaseModel:
    """Put the configuration of a little classifier into a folder."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    config.save_pretrained(folder)
    return BaseModel(
        name="random",
        path=str(folder),
        revision=None,
        task="classification",
        num_labels=3,
        label_names=("a", "b", "c"),
        head_modules=("score",),
    )


def adapter_with(num_labels: int) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(B=torch.randn(8, 2, generator=generator), A=torch.randn(2, 8, generator=generator))
    head = {"score.weight": torch.randn(num_labels, 8, generator=generator)}
    return Adapter(factors={"model.layers.0.self_attn.q_proj": factors}, head=head, scale=2.0)
