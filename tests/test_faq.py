"""The page of errors shows what the program says: each message there is raised through the real code."""

import re

import pytest
from commands import make_world
from documents import ROOT, blocks
from small import finished, make_experiment, save_llama
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.platform.errors import FedloomError
from fedloom.platform.ray_cluster import actors_per_pool

PAGE = ROOT / "docs" / "start" / "faq.md"
SHOWN = [block.text.strip() for block in blocks(PAGE) if block.language == "text"]
DRY = ("run", "mine.yaml", "--dry-run", "--executor", "local")
COMMANDS = {
    "no such preset": ("run", "dema"),
    "unknown key": (*DRY, "--set", "training.learning_rat=0.1"),
    "unknown method": (*DRY, "--set", "method.name=florest"),
    "an option of another method": (*DRY, "--set", "method.tau=0.9"),
    "steps and epochs": (*DRY, "--set", "training.epochs=1"),
    "no data": (*DRY, "--set", "data.source=row.jsonl"),
    "no column": (*DRY, "--set", "data.columns.label=stars"),
    "no number of clients": (*DRY, "--set", "partition.kind=dirichlet"),
    "large cohort": (*DRY, "--set", "cohort.size=7"),
    "no model": (*DRY, "--set", "model.name=./models"),
    "no such layers": (*DRY, "--set", "adapter.targets=[q_prog]"),
    "large rank": (*DRY, "--set", "method.name=fedit", "--set", "adapter.rank=4"),
    "little memory": (*DRY, "--set", "population.profiles.0.memory_gib=0.00001"),
    "no runs": ("compare", "reviews"),
    "no such run": ("resume", "1f0c"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def shows(message):
    """Return the messages of the page that are this one; an ellipsis stands for any text."""
    patterns = {shown: re.escape(" ".join(shown.split())).replace("…", ".+") for shown in SHOWN}
    return [shown for shown, pattern in patterns.items() if re.fullmatch(pattern, " ".join(message.split()))]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_the_page_shows(name, world, monkeypatch):
    monkeypatch.chdir(world)
    done = CliRunner().invoke(app, list(COMMANDS[name]))

    assert done.exit_code == 2
    assert len(shows(done.stderr)) == 1, done.stderr


def too_few_updates(folder):
    finished(make_experiment(save_llama(folder / "model"), updates={"max_norm": 1e-9}))


def too_little_cluster(folder):
    phone, laptop = (("num_cpus", 1.0),), (("num_cpus", 2.0),)
    actors_per_pool({phone: phone, laptop: laptop}, {"num_cpus": 2.0}, {"num_cpus": 2.0})


RAISED = (too_few_updates, too_little_cluster)


@pytest.mark.parametrize("raising", RAISED, ids=lambda function: function.__name__)
def test_a_run_says_what_the_page_shows(raising, tmp_path):
    with pytest.raises(FedloomError) as caught:
        raising(tmp_path)

    assert len(shows(f"error: {caught.value}")) == 1, caught.value


def test_the_page_shows_nothing_else():
    """Each message on the page is one of those above."""
    assert len(SHOWN) == len(set(SHOWN)) == len(COMMANDS) + len(RAISED)
