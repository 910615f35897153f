"""A population of trials, played for real: the worse one goes on from the better one's state, and says so."""

import pytest
import yaml
from commands import fedloom, make_world
from mlflow import MlflowClient

NOTHING, TOO_MUCH = 1e-7, 0.02  # learning rates: the loss stays, and in the first round it grows
SWEEP = {
    "name": "population",
    "experiment": "mine.yaml",
    "set": {"rounds": 2, "evaluation.every": 1},
    "space": {"training.learning_rate": [NOTHING, TOO_MUCH]},
    "objectives": [{"metric": "eval/loss", "mode": "min"}],
    "scheduler": {"kind": "pbt", "interval": 1},
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)  # its two trials start their actors twice
def test_the_worse_goes_on_from_the_better_and_says_so(tmp_path):
    world = make_world(tmp_path)
    (world / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    done = fedloom("sweep", "sweep.yaml", cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr

    client = MlflowClient(f"sqlite:///{world}/fedloom-runs/mlflow.db")
    found = client.search_runs(["1"], "params.rounds = '2'")
    runs = {float(run.data.params["training.learning_rate"]): run for run in found}
    better, worse = runs[NOTHING], runs[TOO_MUCH]
    losses = {
        rate: [point.value for point in client.get_metric_history(run.info.run_id, "eval/loss")]
        for rate, run in runs.items()
    }
    assert [len(each) for each in losses.values()] == [3, 3]
    assert losses[TOO_MUCH][1] > losses[NOTHING][1]

    taken = worse.data.tags["fedloom.taken_over.1"]
    assert taken.startswith(f"run {better.info.run_id}; goes on with training.learning_rate=")
    assert not [tag for tag in better.data.tags if tag.startswith("fedloom.taken_over")]
    first, second = (
        world / "fedloom-runs" / "checkpoints" / run.info.run_id / "rounds" / "000001.json" for run in (better, worse)
    )
    assert first.read_bytes() == second.read_bytes()
