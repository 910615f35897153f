"""``fedloom compare`` over a store with a sweep: what is chosen, shown, written, attached and refused."""

import csv
import re
from itertools import pairwise
from pathlib import Path

import pytest
from html_page import Page
from mlflow import MlflowClient
from recorded import ROUND_BYTES, experiment, record, record_parent
from small import make_data, make_experiment, save_llama
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.jobs.runs import execute, open_executor
from fedloom.platform.preparation import assemble
from fedloom.platform.tracking import Tracking
from fedloom.platform.tracking_read import Records

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")

ACCURACIES = {  # by method and seed: one is better by about two points at every seed, one by nothing
    "florist": (0.72, 0.74, 0.73, 0.75),
    "flexlora": (0.70, 0.72, 0.708, 0.731),
    "fedit": (0.69, 0.73, 0.70, 0.74),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store with a sweep of three methods and four seeds, a broken run, a stopped one and one by itself."""
    tracking = Tracking(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")
    parent = record_parent(tracking, "ranks")
    for place, (method, accuracies) in enumerate(ACCURACIES.items()):
        for seed, accuracy in enumerate(accuracies):
            described = experiment(method, seed)
            bytes_up = (3 - place) * ROUND_BYTES
            record(
                tracking,
                described,
                accuracy=accuracy,
                parent=parent,
                bytes_up=bytes_up,
                tags={"fedloom.sweep": "ranks"},
            )
    with pytest.raises(RuntimeError), tracking.run(experiment("soft", 7), parent_run_id=parent):
        raise RuntimeError("broken")
    stopped = record(tracking, experiment("ffa", 8), accuracy=0.99, parent=parent, tags={"fedloom.sweep": "ranks"})
    tracking.stopped(stopped, "after round 2 of 3")
    alone = record(tracking, experiment("fedit", 5, name="alone", rounds=2), accuracy=0.6, clock=False)
    return tracking.uri, parent, alone


def compared(uri, *arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments), "--tracking-uri", uri], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def written(store, tmp_path_factory):
    """Return what comparing the sweep has printed, and the folder with what it has written."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "paper.yaml").write_text(
        "source: Table 3 & <more>\npublished: [{group: flor*, metric: accuracy, value: 0.7}]"
    )
    files = ["--html", folder / "r.html", "--csv", folder / "r.csv", "--latex", folder / "r.tex"]
    result = compared(store[0], "ranks", *files, "--reference", folder / "paper.yaml")
    assert result.exit_code == 0, result.output
    return result.stdout, folder


def test_the_terminal_says_what_is_beyond_noise(written):
    """About two points at every seed are; less than two points that come and go are not."""
    output = written[0]

    assert output.splitlines()[3].startswith("florist ")
    assert "Highest mean accuracy: florist, 73.5% (95% interval 71.4% to 75.6% over 4 seeds)." in output
    assert re.search(r"Below it beyond noise: flexlora \(-2\.0 points\)\.", output)
    assert re.search(r"Within noise of it: fedit \(-2\.0 points\)\.", output)
    assert re.search(r"Run \w{8} \(made-up/soft\) is left out: it is FAILED\.", output)


def test_what_a_scheduler_has_stopped_is_not_set_beside_whole_runs(written):
    """Its last accuracy is that of fewer rounds; it is named, and the others' report is attached all the same."""
    assert re.search(r"Run \w{8} \(made-up/ffa\) is left out: it was stopped after round 2 of 3\.", written[0])
    assert not re.search(r"^ffa ", written[0], flags=re.MULTILINE)
    assert "The report is attached" in written[0]


def test_the_table_as_csv_is_what_was_recorded(written):
    with (written[1] / "r.csv").open() as file:
        rows = {row["group"]: row for row in csv.DictReader(file)}

    assert list(rows) == ["florist", "fedit", "flexlora"]
    for place, (method, accuracies) in enumerate(ACCURACIES.items()):
        row = rows[method]
        assert float(row["accuracy"]) == pytest.approx(sum(accuracies) / 4)
        assert float(row["bytes_up"]) == 3 * (3 - place) * ROUND_BYTES
        assert float(row["sim_seconds"]) == 3 * 12 * (3 - place)
        assert len(row["run_ids"].split()) == 4
    assert rows["florist"]["published"] == "accuracy=0.7 (Table 3 & <more>)"
    assert "bytes" in rows["fedit"]["fronts"].split()
    assert "bytes" not in rows["flexlora"]["fronts"].split()


def test_the_latex_table_is_escaped(written):
    text = (written[1] / "r.tex").read_text()

    assert r"accuracy (\%)" in text
    assert r"73.5 $\pm$ 2.1" in text
    assert text.count(r" \\") == 4
    assert re.sub(r"\\[%_&#]", "", text).count("%") == 0


@pytest.fixture(scope="module")
def page(written):
    return Page((written[1] / "r.html").read_text())


def test_the_report_needs_nothing_but_itself(page, written):
    """No address, no script, no file: everything that it refers to is in it."""
    text = (written[1] / "r.html").read_text()

    assert "//" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.findall(r"url\((?!#)|@import|<script|<link|<img|<iframe", text)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    targets = {attributes["href"] for _, attributes, _ in page.elements if "href" in attributes}
    assert len(ids) == len(set(ids))
    assert targets <= {f"#{name}" for name in ids}


def test_the_report_can_be_read_without_seeing_it(page):
    """Headings without gaps, a caption for each table, scopes for its headers, a label for each picture."""
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.of("table")) == len(page.of("caption")) > 3
    assert all(attributes.get("scope") in {"row", "col"} for attributes in page.of("th"))
    assert len(page.of("svg")) >= 8
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.of("svg"))
    assert page.of("html") == [{"lang": "en"}]
    assert not page.open


def test_the_report_holds_every_part(page):
    for words in (
        "Final accuracy",
        "Accuracy against bytes",
        "Accuracy against simulated time",
        "Accuracy over rounds",
        "Accuracy over bytes",
        "What is beyond noise",
        "Accuracy over clients",
        "Rank spectra",
        "Published for florist: accuracy 70.0%. Source: Table 3 & <more>",
        "is left out: it is FAILED",
    ):
        assert words in page.text


def test_the_parent_has_the_report_as_an_artifact(store, written, tmp_path):
    client = MlflowClient(tracking_uri=store[0])
    path = client.download_artifacts(store[1], "report/report.html", str(tmp_path))

    assert Path(path).read_text() == (written[1] / "r.html").read_text()


def test_a_part_of_a_sweep_does_not_replace_its_report(store, written):
    """By default; --attach does it all the same, and says no where there is no one parent."""
    uri, parent, alone = store
    child = Records(uri).runs(f"tags.`mlflow.parentRunId` = '{parent}' AND attributes.status = 'FINISHED'")[0].run_id

    assert "attached" not in compared(uri, child).stdout
    assert f"attached to the parent run {parent[:8]}" in compared(uri, child[:10], "--attach").stdout
    refused = compared(uri, child, alone, "--attach")
    assert refused.exit_code == 2
    assert "the runs do not share one parent" in refused.stderr


def test_runs_are_found_by_filter_and_by_the_name_of_their_experiment(store):
    by_filter = compared(store[0], "--filter", "tags.method = 'florist' and tags.seed = '2'")
    by_name = compared(store[0], "alone")

    assert "Highest mean accuracy: florist, 73.0% (one seed, no interval)." in by_filter.stdout
    assert "Highest mean accuracy: fedit, 60.0% (one seed, no interval)." in by_name.stdout
    assert "One seed only, so that no interval can be had: fedit." in by_name.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name runs, sweeps or experiments, or give --filter. Sweeps: ranks. Experiments: "),
        (["rank"], "Did you mean 'ranks'?"),
        (["it's"], "no sweep or experiment has this name"),
        (["ffffffff"], "no run's id begins so"),
        (["--filter", "tags.method = 'sft'"], "lets no run through"),
        (["--filter", "method is soft"], "tracking store"),
        (["--filter", "tags.method = 'soft'"], "there is no finished run to compare."),
        (["ranks", "--html", "nowhere/r.html"], "there is no folder nowhere"),
        (["ranks", "--reference", "nowhere.yaml"], "--reference nowhere.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(store, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = compared(store[0], *arguments)

    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    result = compared(f"sqlite:///{tmp_path}/none.db", "x")

    assert result.exit_code == 2
    assert "no runs are recorded in" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_real_run_is_compared_as_it_was(store, tmp_path, monkeypatch):
    """What the rounds of a trained run said is what stands in the table."""
    monkeypatch.chdir(tmp_path)
    described = make_experiment(save_llama(tmp_path / "llama"), name="trained", rounds=1)
    prepared = assemble(described, make_data())
    with open_executor(described, prepared, local=True) as executor:
        run_id, rounds = execute(prepared.experiment, prepared, executor, Tracking(store[0]))
    result = compared(store[0], run_id[:12], "--csv", "r.csv")
    assert result.exit_code == 0, result.output
    (row,) = csv.DictReader(Path("r.csv").read_text().splitlines())

    assert row["run_ids"] == run_id
    for name, metric in (("accuracy", "eval/accuracy"), ("loss", "eval/loss"), ("bytes_total", "bytes/total")):
        assert float(row[name]) == rounds[-1].metrics[metric]
    assert float(row["clients_std"]) > 0
    assert float(row["rank"]) == 2  # fedit trains everybody at the smallest rank
