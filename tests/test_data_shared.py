"""The sample data beside the checkout, read as users would read it. Run: pytest tests/test_data_shared.py."""

import json
from collections import Counter

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fedloom.platform.builtin import TINY_FOLDER
from fedloom.platform.data.federated import FederatedData, collate
from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.experiment import Experiment

CASES = {
    "agnews": {
        "data": {"source": "agnews.jsonl"},
        "partition": {"kind": "dirichlet", "alpha": 0.3, "num_clients": 20},
    },
    "dolly": {
        "data": {
            "source": "dolly.jsonl",
            "task": "causal_lm",
            "columns": {"prompt": "instruction", "completion": "response", "client": "category"},
        }
    },
    "t0_tasks": {"data": {"source": "t0_tasks.jsonl", "task": "causal_lm", "columns": {"client": "template"}}},
    "shakespeare": {"data": {"source": "shakespeare.jsonl", "task": "causal_lm", "columns": {"client": "role"}}},
    "commonsense": {
        "data": {
            "source": "commonsense.jsonl",
            "task": "causal_lm",
            "columns": {"prompt": "instruction", "completion": "output", "client": "task"},
        }
    },
    "mmlu": {
        "data": {
            "source": "mmlu.jsonl",
            "train_split": "dev",
            "columns": {"text": "question", "label": "answer", "client": "subject"},
        }
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(TINY_FOLDER)


@pytest.fixture(scope="module")
def prepared(shared_data, tokenizer):
    """Prepare a case once, and return it with its rows."""
    kept: dict[str, tuple[FederatedData, list[dict]]] = {}

    def prepare(name: str) -> tuple[FederatedData, list[dict]]:
        if name not in kept:
            case = json.loads(json.dumps(CASES[name]))
            path = shared_data / case["data"]["source"]
            case["data"]["source"] = str(path)
            with path.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            kept[name] = prepare_data(Experiment.model_validate(case), tokenizer), rows
        return kept[name]

    return prepare


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_used_once(prepared, name):
    """Training rows have one client each, the others are held out, and natural clients have the sizes of the column."""
    data, rows = prepared(name)
    settings = CASES[name]["data"]
    train = [row for row in rows if row["split"] == settings.get("train_split", "train")]

    members = np.concatenate(list(data.clients.values()))
    assert len(members) == len(train)
    np.testing.assert_array_equal(np.sort(np.concatenate([members, data.test])), np.arange(len(rows)))
    if "client" in settings.get("columns", {}):
        counted = Counter(row[settings["columns"]["client"]] for row in train)
        assert {client: len(part) for client, part in data.clients.items()} == counted


@pytest.mark.parametrize(
    ("name", "clients"), [("t0_tasks", 235), ("shakespeare", 145), ("dolly", 8), ("commonsense", 7)]
)
def test_natural_clients_are_found(prepared, name, clients):
    """As many as the manifest of the data says."""
    assert len(prepared(name)[0].clients) == clients


def test_agnews_is_skewed_over_twenty_clients(prepared):
    """Dirichlet 0.3 over four labels: most clients have far more than a quarter of one label."""
    data, _ = prepared("agnews")
    shares = [np.bincount(data.labels[part]).max() / len(part) for part in data.clients.values()]

    assert len(shares) == 20
    assert np.mean(shares) > 0.5
    assert data.label_names == ("Business", "Science or Technology", "Sports", "World")


@pytest.mark.parametrize("name", ["dolly", "t0_tasks", "shakespeare", "commonsense"])
def test_every_example_has_something_to_learn(prepared, tokenizer, name):
    """Also rows with empty completions, which teach to stop; and none is longer than max_length."""
    data, rows = prepared(name)
    lengths = np.diff(data.offsets)

    assert (lengths <= 128).all()
    assert (lengths - data.labels >= 1).all()
    batch = collate(data, data.test[:16])
    learnt = [
        tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    column = {"dolly": "response", "t0_tasks": "completion", "commonsense": "output", "shakespeare": "text"}[name]
    tests = [row[column] for row in rows if row["split"] == "test"][:16]
    for text, expected in zip(learnt, tests, strict=True):
        assert (expected + tokenizer.eos_token).startswith(text.rstrip("\ufffd"))
