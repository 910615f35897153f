"""From files to tokenised federated data: what is read, held out and learnt. Run: pytest tests/test_data.py."""

import ast
import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedloom.platform.data.federated import FederatedData, collate, fingerprint_of
from fedloom.platform.data.prepare import majority_accuracy, prepare_data
from fedloom.platform.data.tokens import tokenize
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import DataSection, Experiment
from fedloom.platform.experiment_file import validated

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


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("data") / "animals.jsonl", make_rows())


@pytest.fixture(scope="module")
def animals(source) -> FederatedData:
    return prepare(source)


@pytest.fixture(scope="module")
def answers(source) -> FederatedData:
    return prepare(source, task="causal_lm")


# ---------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["animals.json", "animals.csv", "animals.parquet", "odd [1]* name.jsonl"])
def test_the_format_of_the_file_changes_nothing(tmp_path, animals, name):
    """The same rows give the same fingerprint from every format, under any file name."""
    assert prepare(save(tmp_path / name, make_rows())).fingerprint == animals.fingerprint


def test_a_folder_with_splits_is_read_like_a_hub_dataset(tmp_path, animals):
    """One file a split gives what one file with a split column gives."""
    for split in ("train", "test"):
        save(tmp_path / f"{split}.jsonl", [row for row in make_rows() if row["split"] == split])

    assert prepare(tmp_path).fingerprint == animals.fingerprint


def test_a_changed_file_is_read_anew(tmp_path):
    """No cache stands between the file and the data."""
    path = save(tmp_path / "animals.jsonl", make_rows())
    before = prepare(path)
    save(path, make_rows(70))

    assert len(prepare(path).labels) == len(before.labels) + 10


def test_words_that_pandas_takes_for_missing_are_words(tmp_path):
    """In a CSV file "None" and "NA" are texts like any other."""
    rows = make_rows()
    rows[0]["text"], rows[1]["text"] = "None", "NA"

    assert texts_of(prepare(save(tmp_path / "words.csv", rows)), np.arange(2)) == ["None", "NA"]


def test_the_builtin_data_needs_no_columns():
    """`builtin:stdlib` knows its own clients and splits; no label and no client is lost."""
    from fedloom.platform.builtin.stdlib_docs import stdlib_examples

    examples = stdlib_examples()

    data = prepare_data(Experiment(), TOKENIZER)

    assert data.label_names == tuple(sorted({example.label for example in examples}))
    assert list(data.clients) == sorted({example.client for example in examples if example.split == "train"})
    assert len(data.test) == sum(example.split == "test" for example in examples)


# ------------------------------------------------------------------------------------------------- labels and clients


def test_every_text_keeps_its_label_and_its_client(animals):
    """Tokens, labels and clients stay in step from the file to the arrays."""
    rows = {row["text"]: row for row in make_rows()}

    for client, members in animals.clients.items():
        for index, text in zip(members, texts_of(animals, members), strict=True):
            assert (client, "train") == (rows[text]["writer"], rows[text]["split"])
            assert animals.label_names[animals.labels[index]] == rows[text]["label"]
    assert {row["text"] for row in make_rows() if row["split"] == "test"} == set(texts_of(animals, animals.test))


def test_labels_that_are_integers_are_sorted_by_size(tmp_path):
    """Ten comes after nine."""
    rows = [{**row, "label": i % 12} for i, row in enumerate(make_rows())]

    assert prepare(save(tmp_path / "numbers.jsonl", rows)).label_names == tuple(str(i) for i in range(12))


def test_declared_classes_bring_their_names(tmp_path):
    """A file that stores classes as integers with names, as hub datasets do, keeps the declared order."""
    import datasets

    names = {"label": datasets.ClassLabel(names=["mammal", "avian"]), "writer": datasets.ClassLabel(num_classes=4)}
    table = datasets.Dataset.from_list(make_rows())
    table = table.cast_column("label", names["label"])
    table = table.map(lambda row: {"writer": row["writer"][1:]}).cast_column("writer", names["writer"])
    table.to_parquet(str(tmp_path / "declared.parquet"))

    data = prepare(tmp_path / "declared.parquet")

    assert data.label_names == ("mammal", "avian")
    assert list(data.clients) == ["0", "1", "2", "3"]


def test_majority_accuracy_counts_the_training_label(tmp_path):
    """The most common label of the training examples, wherever the test examples have their mode."""
    rows = make_rows()
    for row in rows:
        row["label"] = "rare" if row["split"] == "test" else row["label"]
    rows[-1]["label"], rows[0]["label"] = "mammal", "rare"

    assert majority_accuracy(prepare(save(tmp_path / "skewed.jsonl", rows))) == pytest.approx(1 / 12)
    assert majority_accuracy(prepare(save(tmp_path / "skewed.jsonl", rows), task="causal_lm")) is None


# --------------------------------------------------------------------------------------------------- splits and samples


def without_split(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "split"} for row in rows]


def test_added_rows_move_no_row_to_the_other_split(tmp_path):
    """Without a split column the content alone decides, at about the asked share."""
    few = prepare(save(tmp_path / "few.jsonl", without_split(make_rows(200))))
    many = prepare(save(tmp_path / "many.jsonl", without_split(make_rows(400))[::-1]))

    assert 0.1 < len(few.test) / 200 < 0.3
    assert set(texts_of(few, few.test)) == set(texts_of(many, many.test)) & {row["text"] for row in make_rows(200)}


def test_equal_texts_are_on_one_side(tmp_path):
    """A text that stands twice never is both learnt and tested."""
    data = prepare(save(tmp_path / "twice.jsonl", without_split(make_rows() * 3)))
    learnt = np.concatenate(list(data.clients.values()))

    assert not set(texts_of(data, data.test)) & set(texts_of(data, learnt))


def test_rows_of_other_splits_are_left_out(tmp_path):
    """Only the two named values of the split column are read, and the column may have any name."""
    rows = [{**row, "part": ["dev", "use", "use", "no"][i % 4]} for i, row in enumerate(make_rows())]

    data = prepare(save(tmp_path / "parts.jsonl", rows), columns={"split": "part"}, train_split="use", test_split="dev")

    assert (len(data.test), sum(map(len, data.clients.values()))) == (15, 30)


def test_a_split_column_with_other_words_is_ignored(tmp_path):
    """A column that happens to be called split, and that nobody named, is no reason to fail."""
    rows = [{**row, "split": "banana"} for row in make_rows()]

    data = prepare(save(tmp_path / "fruit.jsonl", rows))

    assert data.fingerprint == prepare(save(tmp_path / "plain.jsonl", without_split(make_rows()))).fingerprint


def test_a_client_test_fraction_moves_examples_of_each_client_and_nothing_else(source, animals):
    """The tokens and the test split stay; each writer's examples are parted; without it the data are as they were."""
    parted = prepare(source, partition={"client_test_fraction": 0.25})

    np.testing.assert_array_equal(parted.input_ids, animals.input_ids)
    np.testing.assert_array_equal(parted.test, animals.test)
    for name, whole in animals.clients.items():
        assert len(parted.held_out[name]) == 3
        np.testing.assert_array_equal(np.union1d(parted.clients[name], parted.held_out[name]), whole)
        assert not set(parted.clients[name]) & set(parted.held_out[name])
    assert animals.held_out == {}
    assert prepare(source, partition={"client_test_fraction": 0.0}).fingerprint == animals.fingerprint


def test_the_sample_of_training_examples_is_seeded(source, animals):
    """`max_train_examples` keeps exactly so many training examples, by the seed alone, and all test examples."""
    first, again, other = (prepare(source, max_train_examples=20, seed=seed) for seed in (1, 1, 2))

    assert sum(map(len, first.clients.values())) == 20
    assert len(first.test) == len(animals.test)
    assert first.fingerprint == again.fingerprint != other.fingerprint


# -------------------------------------------------------------------------------------------------------------- tokens


def test_the_completion_and_the_end_are_learnt_and_the_prompt_is_not(answers):
    """The boundary between prompt and completion is exact."""
    for index in range(len(answers.labels)):
        prompt, completion = (
            TOKENIZER.decode(part) for part in np.split(tokens_of(answers, index), [answers.labels[index]])
        )

        assert prompt.startswith("What")
        assert prompt.endswith("?")
        assert completion in {"It runs.</s>", "It sings.</s>", "It sleeps.</s>"}


def test_the_prompt_is_learnt_if_asked(source, answers):
    """`train_on_prompt` changes which tokens carry loss and nothing else."""
    data = prepare(source, task="causal_lm", train_on_prompt=True)

    assert not data.labels.any()
    np.testing.assert_array_equal(data.input_ids, answers.input_ids)


def test_a_text_alone_is_learnt_whole(tmp_path):
    """Without prompt and completion columns, causal_lm learns the text."""
    rows = [{"text": row["text"], "writer": row["writer"]} for row in make_rows()]

    data = prepare(save(tmp_path / "texts.jsonl", rows), task="causal_lm")

    assert not data.labels.any()
    assert {row["text"] + "</s>" for row in rows} == set(texts_of(data, np.arange(60)))


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text("ab ", max_size=30),
    completion=st.text("ab ", max_size=30),
    max_length=st.integers(2, 40),
    tokenizer=st.sampled_from([TOKENIZER, WITH_BOS]),
)
def test_truncation_leaves_half_to_the_completion(prompt, completion, max_length, tokenizer):
    """The prompt loses its beginning, the completion its end, and neither loses what the other does not use."""
    data = DataSection(task="causal_lm", max_length=max_length)
    start = [tokenizer.bos_token_id] if tokenizer is WITH_BOS else []
    given_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    learnt_ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    tokens = tokenize(data, tokenizer, [prompt], [completion])

    boundary = int(tokens.num_silent[0])
    before, learnt = tokens.input_ids[len(start) : boundary].tolist(), tokens.input_ids[boundary:].tolist()
    assert tokens.input_ids[: len(start)].tolist() == start
    assert before == given_ids[len(given_ids) - len(before) :]
    assert learnt == learnt_ids[: len(learnt)]
    assert len(learnt) >= min(len(learnt_ids), max_length / 2)
    assert len(tokens.input_ids) == min(len(start) + len(given_ids) + len(learnt_ids), max_length)


def test_classification_takes_the_tokenizers_special_tokens(source):
    """Texts are tokenised as the tokenizer itself does it, and cut to max_length."""
    data = prepare(source, tokenizer=WITH_BOS, max_length=3)
    first = make_rows()[0]["text"]

    assert tokens_of(data, 0) == WITH_BOS(first, truncation=True, max_length=3)["input_ids"]
    assert tokens_of(data, 0)[0] == WITH_BOS.bos_token_id


def test_two_texts_are_joined_as_the_tokenizer_joins_them(tmp_path):
    """A premise and a hypothesis: tokenised as the tokenizer's own pair, also where they are cut."""
    path = save(tmp_path / "pairs.jsonl", make_rows())
    for max_length in (128, 6):
        data = prepare(path, max_length=max_length, columns={"text": "text", "text_pair": "completion"})
        first = make_rows()[0]
        expected = TOKENIZER(first["text"], first["completion"], truncation=True, max_length=max_length)["input_ids"]
        assert tokens_of(data, 0) == expected
        assert len(expected) <= max_length
    np.testing.assert_array_equal(data.labels, prepare(path).labels)


def test_a_template_words_the_instruction_and_its_input(tmp_path):
    """Alpaca's wording; a row without an input gets the shorter one, and braces are text."""
    rows = [{"ask": f"Say {{i}} {i}", "given": "this" if i % 2 else "", "answer": "So."} for i in range(40)]
    path = save(tmp_path / "asked.jsonl", rows)
    columns = {"client": None, "prompt": "ask", "completion": "answer"}
    options = {"task": "causal_lm", "template": "alpaca", "partition": {"kind": "iid", "num_clients": 2}}
    both = prepare(path, max_length=512, columns={**columns, "input": "given"}, **options)
    alone = prepare(path, max_length=512, columns=columns, **options)

    for data, longer in ((both, {True, False}), (alone, {False})):
        texts = texts_of(data, np.arange(40))
        assert all(text.endswith("\n\n### Response:\nSo.</s>") for text in texts)
        assert all("\n\n### Instruction:\nSay {i} " in text for text in texts)
        assert {"\n\n### Input:\nthis\n\n### Response:" in text for text in texts} == longer
        assert {"paired with an input" in text for text in texts} == longer


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"task": "causal_lm", "columns": {"text_pair": "b"}}, "text_pair is read in classification"),
        ({"template": "alpaca"}, "data.template is for causal_lm"),
        ({"task": "causal_lm", "columns": {"input": "b"}}, "set data.template: alpaca"),
        ({"task": "causal_lm", "template": "alpacca"}, "template"),
    ],
)
def test_columns_that_a_task_does_not_read_are_refused(data, said):
    with pytest.raises(ExperimentError, match=said):
        validated({"data": data}, place="x.yaml")


def test_padding_falls_back_to_the_end_of_sequence(source):
    """GPT-2 and Llama have no padding token; the attention mask hides what stands there."""
    tokenizer = make_tokenizer(pad=False)

    assert prepare(source, tokenizer=tokenizer).pad_token_id == tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------------------- batches


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


# ------------------------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("kind", ["natural", "iid", "dirichlet"])
def test_preparing_says_nothing(source, capfd, kind):
    """No progress bar, log line or warning reaches the terminal."""
    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(source, partition={"kind": kind} | ({} if kind == "natural" else {"num_clients": 3}))

    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_data_libraries_are_imported_where_they_are_used():
    """`fedloom --help` must not wait for libraries that only a run needs: no module names them outside a function."""
    for path in (Path(__file__).parents[1] / "platform" / "data").glob("*.py"):
        statements = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in statements]

        assert not {name.split(".")[0] for name in names} & {
            "datasets",
            "flwr_datasets",
            "huggingface_hub",
            "transformers",
            "pandas",
            "pyarrow",
        }
