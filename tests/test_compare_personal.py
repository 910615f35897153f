"""``fedloom compare`` keeps the accuracy of clients' own models apart from that of a global model."""

import csv
import re

import pytest
from html_page import Page
from recorded import experiment, record
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.platform.tracking import Tracking

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """Return a store with runs of one method with a global model and of two without: theirs serve a newcomer badly."""
    tracking = Tracking(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")
    for seed in SEEDS:
        record(tracking, experiment("fedit", seed), accuracy=0.7 + 0.01 * seed)
        record(tracking, experiment("fedsa", seed), accuracy=0.31, personal=0.93 + 0.01 * seed)
        record(tracking, experiment("local_only", seed), accuracy=0.32, personal=0.84)
    return tracking.uri


def written(uri, folder, *arguments):
    """Return what is printed and the texts of the three files."""
    files = {name: folder / f"r.{name}" for name in ("html", "csv", "latex")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    command = ["compare", *arguments, *options, "--tracking-uri", uri]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout, {name: path.read_text() for name, path in files.items()}


@pytest.fixture(scope="module")
def both(uri, tmp_path_factory):
    return written(uri, tmp_path_factory.mktemp("both"), "made-up")


TITLES = ("Means over seeds", "Clients' own models", "Final accuracy of")


def tables(output):
    """Return the tables of the terminal by how their titles begin."""
    parts = re.split(rf"^({'|'.join(TITLES)})", output, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_own_models_have_a_table_of_their_own_on_the_terminal(both):
    found = tables(both[0])

    assert "fedsa" not in found["Means over seeds"]
    assert "local_only" not in found["Means over seeds"]
    assert not re.search(r"^fedit ", found["Clients' own models"], flags=re.MULTILINE)
    assert re.search(r"fedsa +3 +94\.0% ± 2\.5 ", found["Clients' own models"])
    assert "Final accuracy of" not in found  # one group with a global model: there is nothing to test it against


def test_own_models_win_nothing(both):
    output = both[0]

    assert "Highest mean accuracy: fedit, 71.0%" in output
    assert "Pareto front" not in output
    assert re.search(r"Every client has a model of its own, .*: fedsa, local_only\.", output)


def test_in_csv_the_two_accuracies_never_share_a_column(both):
    rows = {row["group"]: row for row in csv.DictReader(both[1]["csv"].splitlines())}

    assert list(rows) == ["fedit", "fedsa", "local_only"]
    for name, row in rows.items():
        assert (row["accuracy"] == "") == (name != "fedit")
        assert (row["personal_accuracy"] == "") == (name == "fedit")
        assert float(row["bytes_up"]) > 0
        assert len(row["run_ids"].split()) == len(SEEDS)
    assert float(rows["fedsa"]["personal_accuracy"]) == pytest.approx(0.94)
    assert float(rows["local_only"]["personal_worst_decile"]) == pytest.approx(0.64)


def test_latex_has_two_tables(both):
    first, second = both[1]["latex"].split(r"\end{table}")[:2]

    assert "tab:comparison" in first
    assert "fedsa" not in first
    assert "tab:personal" in second
    assert r"94.0 $\pm$ 2.5" in second
    assert "fedit" not in second


def test_the_report_has_a_section_for_them(both):
    page = Page(both[1]["html"])
    figures, own = page.text.index("Figures by group"), page.text.rindex("Clients' own models")

    assert not page.open
    assert "9 runs in 3 groups" in page.text
    assert "94.0%" not in page.text[figures:own]
    assert "31.0%" not in page.text  # the model that a newcomer starts from speaks for nobody


def test_there_may_be_nothing_but_own_models(uri, tmp_path):
    output, files = written(uri, tmp_path, "--filter", "params.`method.name` = 'fedsa'")

    assert list(tables(output)) == ["Clients' own models"]
    assert not Page(files["html"]).open
    assert "What the figures say" not in files["html"]
    assert "tab:comparison" not in files["latex"]
    assert len(files["csv"].splitlines()) == 2
