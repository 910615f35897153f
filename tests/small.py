"""A world small enough for tests: a random Llama or RoBERTa, and data whose label can be read off one token."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

from fedloom.platform.adapter import Adapter
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import groups_of, pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.rounds import Round

VOCABULARY = 64
PAD = 1
# One method of each kind, for tests that train: a sum, a sum of changes, a stack that becomes a patch, masks. What must
# hold for every single method is a law, see test_laws.py: those take milliseconds.
KINDS = ("fedit", "fslora", "florist", "soft")
# A method whose clients have a memory, set so that every client prunes itself soon.
PRUNING = {"name": "hetlora", "gamma": 0.5, "tail_penalty": 10.0, "min_rank": 1}
FIRST_WORD = 4  # tokens below are special to one architecture or the other


def save_llama(folder: Path) -> Path:
    """Save a random decoder of two layers, hidden size 16 and d_out != d_in in its key and value projections."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_roberta(folder: Path) -> Path:
    """Save a random encoder of two layers and hidden size 16."""
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=34,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def make_data(*, num_clients: int = 6, per_client: int = 12, task: str = "classification") -> FederatedData:
    """Make examples of 3 to 8 tokens; the class is the first token's number modulo three, clients differ in size."""
    rng = np.random.default_rng(0)
    sizes = [per_client + client for client in range(num_clients)]
    num_examples = sum(sizes) + 24
    lengths = rng.integers(3, 9, num_examples)
    input_ids = rng.integers(FIRST_WORD, VOCABULARY, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = (input_ids[offsets[:-1]] % 3).astype(np.int64)
    ends = np.cumsum(sizes)
    clients = {f"c{i}": np.arange(end - sizes[i], end, dtype=np.int64) for i, end in enumerate(ends)}
    return FederatedData(
        task=task,
        input_ids=input_ids,
        offsets=offsets,
        labels=labels if task == "classification" else np.ones(num_examples, dtype=np.int64),
        clients=clients,
        test=np.arange(ends[-1], num_examples, dtype=np.int64),
        label_names=("x", "y", "z") if task == "classification" else (),
        pad_token_id=PAD,
        fingerprint="made-in-a-test",
    )


def make_experiment(folder: Path, **changes: object) -> Experiment:
    """Make an experiment on such a model: three rounds, four of six clients, ranks 2 and 4 on equal machines."""
    document: dict[str, object] = {
        "rounds": 3,
        "model": {"name": str(folder)},
        "population": {
            "profiles": [{"name": "small", "share": 1, "rank": 2}, {"name": "large", "share": 1, "rank": 4}],
        },
        "cohort": {"size": 4},
        "training": {"learning_rate": 0.01, "batch_size": 4, "steps": 2},
        "evaluation": {"batch_size": 8},
        "chunk_size": 1,
        "method": {"name": "fedit"},
    }
    return Experiment.model_validate(document | changes)


def finished(experiment: Experiment, data: FederatedData | None = None) -> tuple[list[Round], Adapter]:
    """Run an experiment in this process; returns its rounds, the untrained one first, and the global adapter."""
    prepared = assemble(experiment, data or make_data())
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment), groups_of(experiment))
    try:
        return list(run(prepared.experiment, prepared, executor)), executor.export()
    finally:
        executor.close()
