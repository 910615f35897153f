"""The quick start and the page on one's own model and data do what they say, block by block."""

from pathlib import Path

import pytest
from documents import ROOT, blocks
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.jobs.presets import experiment_path
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment_file import load_experiment
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import prepare

OWN = {block.language: block.text for block in blocks(ROOT / "docs" / "how-to" / "own-model.md")}


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """Make the data with the page's code, and put the page's experiment beside them."""
    monkeypatch.chdir(tmp_path)
    exec(compile(OWN["python"], "own-model.md", "exec"), {})
    Path("reviews.yaml").write_text(OWN["yaml"])
    return load_experiment(Path("reviews.yaml"))


def test_the_experiment_of_the_page_learns_from_the_data_of_the_page(reviews):
    """Six shops, two kinds of machines, and after its rounds the labels are known better than before."""
    prepared = prepare(reviews)
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(prepared.experiment))
    try:
        rounds = list(run(prepared.experiment, prepared, executor))
    finally:
        executor.close()

    assert {client.id for client in prepared.clients} == {f"shop-{number}" for number in range(6)}
    assert {client.rank for client in prepared.clients} == {2, 4}
    assert rounds[-1].metrics["eval/accuracy"] > rounds[0].metrics["eval/accuracy"]


def test_a_dry_run_prints_a_file_that_can_be_run(tmp_path, monkeypatch):
    """``--dry-run > mine.yaml`` is the same experiment, up to its hash."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", "demo", "--dry-run"])
    Path("mine.yaml").write_text(done.stdout)

    assert done.exit_code == 0
    assert load_experiment(Path("mine.yaml")).hash == load_experiment(experiment_path("demo")).hash
