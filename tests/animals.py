"""Sentences about animals: rows whose label can be read off one word, their tokenizer, and files."""

import csv
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedloom.platform.data.federated import FederatedData
from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.experiment import Experiment

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sings", "sleeps", "far", "near", "today"]
ANIMALS = {"cat": "mammal", "dog": "mammal", "bird": "avian"}


def make_tokenizer(*, bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end-of-sequence token and, if asked, one that starts every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {}) | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZER = make_tokenizer()
WITH_BOS = make_tokenizer(bos=True)


def make_rows(count: int = 60) -> list[dict[str, str]]:
    """Sentences whose label can be read off the animal; training rows first, every fifth of the rows is test."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        colour, animal, verb = WORDS[rng.integers(3)], WORDS[3 + i % 3], WORDS[6 + rng.integers(3)]
        rows.append(
            {
                "text": f"{colour} {animal} {verb} {i}",
                "label": ANIMALS[animal],
                "prompt": f"What does the {colour} {animal} do, number {i}?",
                "completion": f"It {verb}.",
                "writer": f"w{i % 4}",
                "split": "test" if i >= count * 4 // 5 else "train",
            }
        )
    return rows


def save(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the file's extension."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def prepare(source: object, *, tokenizer=TOKENIZER, seed=0, partition=None, **data) -> FederatedData:
    data["columns"] = {"client": "writer", **data.get("columns", {})}
    experiment = {"seed": seed, "data": {"source": str(source), **data}, "partition": partition or {}}
    return prepare_data(Experiment.model_validate(experiment), tokenizer)


def tokens_of(data: FederatedData, index: int) -> list[int]:
    return data.input_ids[data.offsets[index] : data.offsets[index + 1]].tolist()


def texts_of(data: FederatedData, indices: np.ndarray) -> list[str]:
    return [TOKENIZER.decode(tokens_of(data, index)) for index in indices]
