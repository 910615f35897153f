"""From tokens to batches, and across processes: what is padded, what carries loss, what a fingerprint covers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from animals import make_rows, prepare, save, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.platform.data.federated import FederatedData, collate, fingerprint_of


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("data") / "animals.jsonl", make_rows())


@pytest.fixture(scope="module")
def animals(source) -> FederatedData:
    return prepare(source)


@pytest.fixture(scope="module")
def answers(source) -> FederatedData:
    return prepare(source, task="causal_lm")


@settings(max_examples=50, deadline=None)
@given(indices=st.lists(st.integers(0, 59), min_size=1, max_size=12), causal=st.booleans())
def test_a_batch_holds_the_tokens_and_pads_on_the_right(animals, answers, indices, causal):
    """What the mask shows are the example's tokens; padding, and in causal_lm the prompt, carries no loss."""
    data = answers if causal else animals

    batch = collate(data, np.array(indices))

    longest = max(len(tokens_of(data, index)) for index in indices)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(indices), longest)
    for i, index in enumerate(indices):
        tokens = tokens_of(data, index)
        padding = longest - len(tokens)
        assert batch["input_ids"][i].tolist() == tokens + [data.pad_token_id] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(tokens) + [0] * padding
        silent = int(data.labels[index])
        expected = [-100] * silent + tokens[silent:] + [-100] * padding if causal else silent
        assert batch["labels"][i].tolist() == expected


def test_arrays_round_trip(source, animals, answers):
    """What crosses the wire is everything, without copies, and its metadata is JSON."""
    for data in (animals, answers, prepare(source, partition={"client_test_fraction": 0.25})):
        arrays, meta = data.arrays()

        back = FederatedData.from_arrays(arrays, json.loads(json.dumps(meta)))

        again = back.arrays()
        assert again[1] == meta
        assert list(back.clients) == list(data.clients)
        assert list(back.held_out) == list(data.held_out)
        assert np.shares_memory(back.input_ids, data.input_ids)
        assert fingerprint_of(*again) == data.fingerprint == back.fingerprint
        for name, values in arrays.items():
            np.testing.assert_array_equal(again[0][name], values)
            assert again[0][name].dtype == values.dtype


def test_read_only_arrays_make_batches(answers):
    """Ray hands arrays out read-only; batches are new memory and nothing warns."""
    arrays, meta = answers.arrays()
    frozen = {name: values.copy() for name, values in arrays.items()}
    for values in frozen.values():
        values.flags.writeable = False
    data = FederatedData.from_arrays(frozen, meta)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = collate(data, data.test)
    batch["labels"].zero_()

    np.testing.assert_array_equal(data.labels, answers.labels)


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token_id": 7},
        {"clients": {}},
        {"held_out": {"w0": np.arange(1)}},
        {"label_names": ("a", "b")},
        {"task": "x"},
    ],
)
def test_the_fingerprint_covers_every_field(animals, change):
    """Two values with one fingerprint are the same data."""
    fields = {name: getattr(animals, name) for name in FederatedData.__slots__}

    assert fingerprint_of(*FederatedData(**{**fields, **change}).arrays()) != animals.fingerprint
