"""Every mistake in the data section is refused with one sentence that says what to do. Run: pytest THIS_FILE."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.errors import DataError
from fedloom.platform.experiment import Experiment

VOCABULARY = {"<eos>": 0, "<unk>": 1, "good": 2, "bad": 3}


def word_tokenizer(**options) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


TOKENIZER = word_tokenizer(eos_token="<eos>")


def make_rows(**columns) -> list[dict]:
    """Eight training and two test rows, with columns changed or (None) missing in the last of each."""
    rows = [
        {"text": "good" if i % 2 else "bad", "label": "yes" if i % 2 else "no", "writer": f"w{i}", "split": split}
        for i, split in enumerate(["train"] * 8 + ["test"] * 2)
    ]
    for name, value in columns.items():
        rows[7][name] = value
    return rows


def message_of(tmp_path, *, rows=None, text=None, name="animals.jsonl", tokenizer=TOKENIZER, **settings) -> str:
    content = "".join(json.dumps(row) + "\n" for row in make_rows() if rows is None) if text is None else text
    if rows is not None:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(content)
    data = {"source": str(tmp_path / name), **settings.pop("data", {})}
    experiment = {"data": data, "partition": {"kind": "iid", "num_clients": 2}, **settings}
    with pytest.raises(DataError) as caught:
        prepare_data(Experiment.model_validate(experiment), tokenizer)
    return str(caught.value).replace(str(tmp_path), "FOLDER")


NATURAL = {"partition": {"kind": "natural"}}
CAUSAL = {"task": "causal_lm"}
COLUMNS = "Columns: label, split, text, writer."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": {"columns": {"text": "txt"}}},
            "key data.columns.text: animals.jsonl has no column 'txt'. Did you mean 'text'? " + COLUMNS,
        ),
        (
            {"data": {"columns": {"label": "stars"}}},
            "key data.columns.label: animals.jsonl has no column 'stars'. " + COLUMNS,
        ),
        (
            {"data": CAUSAL | {"columns": {"prompt": "txt"}}},
            "key data.columns.prompt: animals.jsonl has no column 'txt'. Did you mean 'text'? " + COLUMNS,
        ),
        (
            {"data": CAUSAL | {"columns": {"prompt": "text"}}},
            "key data.columns.completion: animals.jsonl has no column 'completion'. " + COLUMNS,
        ),
        (
            {"data": CAUSAL | {"columns": {"label": "lable"}}, "partition": {"kind": "shards", "num_clients": 2}},
            "key data.columns.label: animals.jsonl has no column 'lable', which partition.kind 'shards' needs. "
            "Did you mean 'label'? " + COLUMNS,
        ),
        (
            NATURAL,
            "key partition.kind: 'natural' needs data.columns.client, the column that says whose a row is. Columns of "
            "animals.jsonl: label, split, text, writer. Or set partition.kind to iid, dirichlet, shards or quantity, "
            "with partition.num_clients.",
        ),
        (
            NATURAL | {"data": {"columns": {"client": "writers"}}},
            "key data.columns.client: animals.jsonl has no column 'writers'. Did you mean 'writer'? " + COLUMNS,
        ),
        (
            {"data": {"columns": {"split": "spilt"}}},
            "key data.columns.split: animals.jsonl has no column 'spilt'. Did you mean 'split'? " + COLUMNS,
        ),
        (
            {"data": {"test_split": "tests"}},
            "key data.test_split: animals.jsonl has no split 'tests'. Did you mean 'test'? Splits: test, train.",
        ),
        (
            {"data": {"columns": {"split": "label"}}},
            "key data.train_split: animals.jsonl has no split 'train'. Splits: no, yes.",
        ),
        (
            {"data": {"test_split": "train"}},
            "key data.test_split: 'train' is also data.train_split; they must differ.",
        ),
        (
            {"data": {"subset": "en"}},
            "key data.subset: animals.jsonl has no subsets, only hub datasets have, got 'en'. Use null.",
        ),
    ],
)
def test_wrong_columns_and_splits(tmp_path, given, message):
    assert message_of(tmp_path, **given) == message


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"text": None}, {}, "key data.columns.text: row 8 of animals.jsonl has no value in column 'text'."),
        ({"label": None}, {}, "key data.columns.label: row 8 of animals.jsonl has no value in column 'label'."),
        ({"label": ""}, {}, "key data.columns.label: row 8 of animals.jsonl has no value in column 'label'."),
        (
            {"writer": None},
            NATURAL | {"data": {"columns": {"client": "writer"}}},
            "key data.columns.client: row 8 of animals.jsonl has no value in column 'writer'.",
        ),
        (
            {"text": 5},
            {},
            "key data.columns.text: column 'text' of animals.jsonl holds values of different types, not text. "
            "Columns of text: label, split, writer.",
        ),
        (
            {"label": 1},
            {},
            "key data.columns.label: column 'label' of animals.jsonl holds values of different types, neither strings "
            "nor integers.",
        ),
        (
            {"text": ""},
            {},
            "key data.source: row 8 of animals.jsonl has no token to learn from; its text is empty. Remove such rows.",
        ),
        (
            {"text": ""},
            {"data": CAUSAL},
            "key data.source: row 8 of animals.jsonl has no token to learn from; its text is empty. Remove such rows.",
        ),
    ],
)
def test_wrong_values_are_named_by_row(tmp_path, columns, given, message):
    """Rows count from 1, as the lines of the file do."""
    assert message_of(tmp_path, rows=make_rows(**columns), **given) == message


def test_columns_of_other_types(tmp_path):
    """Numbers are no text, fractions and lists no label."""
    rows = [{**row, "stars": 0.5, "tags": ["a"], "year": 2000} for row in make_rows()]
    texts = "Columns of text: label, split, text, writer."

    assert [
        message_of(tmp_path, rows=rows, data={"columns": columns})
        for columns in ({"text": "year"}, {"text": "tags"}, {"label": "stars"}, {"label": "tags"})
    ] == [
        f"key data.columns.text: column 'year' of animals.jsonl holds int64, not text. {texts}",
        f"key data.columns.text: column 'tags' of animals.jsonl holds lists, not text. {texts}",
        "key data.columns.label: column 'stars' of animals.jsonl holds float64, neither strings nor integers.",
        "key data.columns.label: column 'tags' of animals.jsonl holds lists, neither strings nor integers.",
    ]


def test_a_label_that_only_the_test_split_has(tmp_path):
    """The classifier could never say it, so it is a slip."""
    rows = make_rows()
    rows[9]["label"] = "yess"

    assert message_of(tmp_path, rows=rows) == (
        "key data.columns.label: row 10 of animals.jsonl is a test example with the label 'yess', which no training "
        "example has. Did you mean 'yes'? Labels: no, yes."
    )


def test_a_single_label_is_nothing_to_learn(tmp_path):
    assert message_of(tmp_path, data={"columns": {"label": "split"}}) == (
        "key data.columns.label: every training example of animals.jsonl has the label 'train' in column 'split'; at "
        "least two labels are needed."
    )


def test_a_file_too_small_to_cut(tmp_path):
    """Two equal texts are on one side, so one split stays empty."""
    rows = [{"text": "good", "label": label} for label in ("yes", "no")]

    assert message_of(tmp_path, rows=rows) == (
        "key data.test_fraction: 0.2 of the 2 rows of animals.jsonl leaves no test example. Bring more rows, or a "
        "column that names each row's split (data.columns.split)."
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "key data.source: empty.jsonl cannot be read as json: it is empty"),
        ("empty.json", "[]", "key data.source: empty.json cannot be read as json: "),
        ("head.csv", "text,label\n", "key data.source: head.csv cannot be read as csv: "),
        (
            "wide.csv",
            "text,label\ngood,yes\nbad,no,no\n",
            "key data.source: wide.csv cannot be read as csv: ParserError: Error tokenizing data. C error: Expected 2 "
            "fields in line 3, saw 3",
        ),
        (
            "cut.jsonl",
            '{"text": "good", "label"',
            "key data.source: cut.jsonl cannot be read as json: ArrowInvalid: JSON parse error: ",
        ),
        ("no.parquet", "text", "key data.source: no.parquet cannot be read as parquet: ArrowInvalid: "),
        (
            "notes.txt",
            "good",
            "key data.source: notes.txt has the extension '.txt', known are .jsonl, .json, .csv, .parquet.",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, capfd, name, text, message):
    """The reason is the reader's own, in one line; nothing else reaches the terminal."""
    found = message_of(tmp_path, name=name, text=text)

    assert found.startswith(message)
    assert "\n" not in found
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("FOLDER/animal.jsonl", "there is no file 'FOLDER/animal.jsonl'. Did you mean 'animals.jsonl'?"),
        ("FOLDER/none/animal.jsonl", "there is no file 'FOLDER/none/animal.jsonl'."),
        ("FOLDER/animals", "there is no file 'FOLDER/animals'. Did you mean 'animals.jsonl'?"),
        ("builtin:stdlb", "no builtin data called 'builtin:stdlb'. Known: builtin:stdlib."),
        (
            "nobody/no-such-dataset",
            "'nobody/no-such-dataset' is no file here, and as a hub dataset it cannot be loaded: ConnectionError: ",
        ),
    ],
)
def test_sources_that_do_not_exist(tmp_path, capfd, source, message):
    """A path is a file that is missing; a name that may be a hub dataset is asked for there (offline in tests)."""
    found = message_of(tmp_path, data={"source": source.replace("FOLDER", str(tmp_path))})

    assert found.startswith(f"key data.source: {message}")
    assert capfd.readouterr() == ("", "")


def test_a_split_whose_labels_are_withheld(tmp_path):
    """Hub datasets mark them with the class -1."""
    import datasets

    rows = [{**row, "label": ["no", "yes"].index(row["label"])} for row in make_rows()]
    for row in rows:
        row["label"] = -1 if row["split"] == "test" else row["label"]
    features = datasets.Features(
        {name: datasets.Value("string") for name in rows[0]} | {"label": datasets.ClassLabel(names=["no", "yes"])}
    )
    for split in ("train", "test"):
        part = [row for row in rows if row["split"] == split]
        datasets.Dataset.from_list(part, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    (tmp_path / "README.md").write_text("")

    assert message_of(tmp_path, name="README.md", text="", data={"source": str(tmp_path)}) == (
        f"key data.columns.label: row 1 of {tmp_path.name}, split 'test', has the class -1 in column 'label', which "
        "says that it is withheld. Choose a split whose classes are published, e.g. data.test_split: validation."
    )


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (
            {"eos_token": "<eos>"},
            CAUSAL | {"max_length": 1},
            "key data.max_length: 1 is too short, causal_lm predicts a token from those before it; at least 2 is "
            "needed.",
        ),
        (
            {"eos_token": "<eos>", "model_max_length": 64},
            {"max_length": 100},
            "key data.max_length: 100 is more than the 64 tokens that the model's tokenizer allows.",
        ),
        ({}, {}, "key model.name: its tokenizer has neither a padding nor an end-of-sequence token."),
        (
            {"pad_token": "<eos>"},
            CAUSAL,
            "key model.name: its tokenizer has no end-of-sequence token, which causal_lm needs.",
        ),
    ],
)
def test_tokenizers_that_do_not_fit(tmp_path, options, data, message):
    assert message_of(tmp_path, tokenizer=word_tokenizer(**options), data=data) == message
