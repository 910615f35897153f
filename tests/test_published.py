"""Published numbers: as their sources say, and refused with a reason where a file is wrong."""

import re

import pytest
import yaml
from conftest import REPOSITORY

from fedloom.platform.errors import PublishedError
from fedloom.tuning.published import load_published

FOLDER = REPOSITORY / "jobs" / "presets" / "papers" / "published"
FILES = sorted(FOLDER.glob("*.yaml"))
SPECIFICATIONS = {"fslora": "fslora_flexlora", "flexlora": "fslora_flexlora", "florist": "florist_soft_tsfa"}
NUMBER = r"\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+"


def numbers_in(line):
    return {float(found.replace(",", "")) for found in re.findall(NUMBER, line)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_stands_in_one_line_of_the_specification(path):
    """Not only somewhere in the text: all values of a row together."""
    folder = REPOSITORY.parent / "shared" / "spec"
    if not folder.is_dir():
        pytest.skip("no ../shared/spec beside the checkout")
    lines = [numbers_in(line) for line in (folder / f"{SPECIFICATIONS[path.stem]}.md").read_text().splitlines()]

    for table in yaml.safe_load(path.read_text())["tables"]:
        for method, cells in table["rows"].items():
            values = {float(cell["value"] if isinstance(cell, dict) else cell) for cell in cells}
            assert any(values <= line for line in lines), f"{table['table']}, {method}: {sorted(values)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_number_is_said_twice(path):
    numbers = load_published(path)
    keys = [(n.table, n.model, n.data, n.method, n.setting, n.metric) for n in numbers]
    assert len(set(keys)) == len(keys) > 0
    assert {n.status for n in numbers} == {"published", "unconfirmed"}


def test_fslora_s_averages_are_the_means_of_their_rows():
    rows = {}
    for number in load_published(FOLDER / "fslora.yaml"):
        if number.metric == "accuracy" and number.table.startswith("v1"):
            rows.setdefault((number.table, number.method), {})[number.data] = number.value

    assert len(rows) == 8
    for row in rows.values():
        average = row.pop("average")
        assert sum(row.values()) / len(row) == pytest.approx(average, abs=0.1)


def test_florist_s_efficiencies_are_those_of_the_ranks():
    """Equal ranks of 16: FedIT sends 16 of each q and v projection, FLoRA eight times that, FFA-LoRA half of it."""
    found = {
        (number.model, number.method): number.value
        for number in load_published(FOLDER / "florist.yaml")
        if number.metric == "efficiency" and number.setting == "homogeneous" and number.data == "dolly"
    }
    layers = {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": 22, "huggyllama/llama-7b": 32, "meta-llama/Llama-3.2-1B": 16}
    for model, count in layers.items():
        fedit = 1e4 / (2 * count * 16)
        for method, factor in (("FedIT", 1), ("FlexLoRA", 1), ("FLoRA", 1 / 8), ("FFA-LoRA", 2)):
            assert found[model, method] == pytest.approx(factor * fedit, rel=0.005)


TABLE = {"table": "Table 1", "metric": "accuracy", "unit": "%", "column": "data", "columns": ["a", "b"]}
ROWS = {"rows": {"X": [1, {"value": 2, "status": "unconfirmed"}]}}


def written(tmp_path, table, **file):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"paper": "P", "arxiv": "2501.00001", "tables": [table], **file}))
    return path


def test_cells_take_what_their_table_says_and_may_be_in_doubt(tmp_path):
    first, second = load_published(written(tmp_path, {**TABLE, **ROWS, "model": "m"}))
    assert (first.model, first.data, first.method, first.metric, first.value) == ("m", "a", "X", "accuracy", 1.0)
    assert (first.status, second.status, second.data) == ("published", "unconfirmed", "b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": {"X": [1]}}, r"tables\.0: row 'X' has 1 values for 2 columns"),
        ({"rows": {"X": [1, float("nan")]}}, r"tables\.0\.rows\.X\.1"),
        ({"rows": {"X": ["much", 1]}}, r"tables\.0\.rows\.X\.0"),
        ({"data": "a"}, "the columns differ in 'data'"),
        ({"metric": None}, "it has no metric"),
        ({"column": "model"}, r"tables\.0\.column"),
        ({"value": 3}, r"tables\.0\.value"),
    ],
)
def test_a_wrong_table_is_refused_at_its_place(tmp_path, change, said):
    with pytest.raises(PublishedError, match=rf"(?s)^mine\.yaml, key .*{said}"):
        load_published(written(tmp_path, {**TABLE, **ROWS, **change}))


@pytest.mark.parametrize("content", [b"", b"- 1", b"paper: [", b"\xff", b"{paper: P, arxiv: '12', tables: []}"])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    (tmp_path / "mine.yaml").write_bytes(content)
    for path in (tmp_path / "mine.yaml", tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(PublishedError, match=path.name):
            load_published(path)
