"""From files to federated data: what is read, what is held out, and who holds what."""

import ast
import warnings
from pathlib import Path

import numpy as np
import pytest
from animals import TOKENIZER, make_rows, prepare, save, texts_of

from fedloom.platform.data.federated import FederatedData
from fedloom.platform.data.prepare import majority_accuracy, prepare_data
from fedloom.platform.experiment import Experiment


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("data") / "animals.jsonl", make_rows())


@pytest.fixture(scope="module")
def animals(source) -> FederatedData:
    return prepare(source)


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
