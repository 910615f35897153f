"""Tasks of the LM Evaluation Harness on a run's adapter. What needs lm-eval itself is skipped where it is absent."""

import importlib.util

import numpy as np
import pytest
import yaml
from questions import WORDS, save_reader, save_rows, some_questions
from small import PAD
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedloom.jobs.harness import metrics_of
from fedloom.jobs.main import app
from fedloom.platform.experiment import Experiment
from fedloom.platform.run_folder import folder_of
from fedloom.platform.tasks.answers import log_likelihoods
from fedloom.platform.tasks.questions import prepare_tasks
from fedloom.platform.tracking import Tracking

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs lm-eval: pip install 'fedloom[lm-eval]'")
TASK = {"name": "choice", "kind": "multiple_choice", "source": "questions.jsonl", "prompt": "{question} ?"}
SAME = {  # as the harness writes it
    "task": "choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} ?",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
DOCUMENT = {
    "rounds": 2,
    "model": {"name": "model"},
    "data": {"source": "rows.jsonl", "task": "causal_lm"},
    "partition": {"kind": "iid", "num_clients": 2},
    "population": {"profiles": [{"name": "s", "share": 1, "rank": 2}]},
    "cohort": {"size": 2},
    "training": {"learning_rate": 0.1, "batch_size": 8, "steps": 8},
    "evaluation": {"tasks": [TASK]},
    "method": {"name": "fedit"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_reader(tmp_path / "model")
    save_rows(tmp_path / "questions.jsonl", some_questions(30))
    save_rows(tmp_path / "rows.jsonl", [{"text": f"{WORDS[i % 17]} {WORDS[i % 5]} {WORDS[i % 3]}"} for i in range(60)])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(DOCUMENT))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(yaml.safe_dump(SAME))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_numbers_of_the_harness_become_metrics():
    """A filter is named where there is one; names, missing errors and counts of samples are no metrics."""
    results = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 30},
        "gsm8k": {"exact_match,strict-match": 1, "exact_match,flexible-extract": 0.25},
    }

    assert metrics_of(results) == {
        "lm_eval/arc/acc": 0.5,
        "lm_eval/gsm8k/exact_match/strict-match": 1.0,
        "lm_eval/gsm8k/exact_match/flexible-extract": 0.25,
    }


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_harness_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", "abc", "--task", "arc_easy"])

    assert done.exit_code == 2
    assert done.stderr == (
        "error: fedloom evaluate needs lm-eval, which is not installed: pip install 'fedloom[lm-eval]'\n"
    )


@needs_harness
def test_log_likelihoods_are_those_of_the_harness(folder):
    """Same tokens at the boundary, same sums, also for white space at the prompt's end and an empty prompt."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    rows = [*some_questions(30), {"question": "", "choices": ["a cat", "sat"], "answer": 0}]
    rows += [{"question": f"the {word} ", "choices": ["a cat", "sat"], "answer": 0} for word in WORDS]
    save_rows(folder / "questions.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    experiment = Experiment.model_validate(DOCUMENT | {"evaluation": {"tasks": [TASK | {"prompt": "{question}"}]}})
    questions = prepare_tasks(experiment, tokenizer, 32)[0].questions
    sequences = [sequence for question in questions for sequence in question.sequences]
    num_given = [given for question in questions for given in question.num_given]
    ours = log_likelihoods(model, sequences, num_given, 4, pad_token_id=PAD)

    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(row["question"], f" {choice}"), idx=0)
        for row in rows
        for choice in row["choices"]
    ]
    # Without its cache: with it, some choices get the likelihood of another question's one (seen in lm-eval 0.4.13).
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, logits_cache=False)
    theirs = [likelihood for likelihood, _ in harness.loglikelihood(requests)]
    np.testing.assert_allclose(sorted(ours), sorted(theirs), rtol=1e-4)


@needs_harness
@pytest.mark.slow
def test_a_run_s_adapter_scores_alike_in_its_own_task_and_in_the_harness(folder):
    """Both answer the same questions with the final adapter; the harness's metrics stand in the same run."""
    runner = CliRunner()
    ran = runner.invoke(app, ["run", "mine.yaml", "--executor", "local"])
    assert ran.exit_code == 0, ran.output
    [run_id] = [path.name for path in folder_of("any").parent.iterdir()]

    done = runner.invoke(app, ["evaluate", run_id[:8], "--task", "choice", "--include", "tasks"])

    assert done.exit_code == 0, done.output
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=Tracking(None).uri).get_run(run_id)
    metrics = found.data.metrics
    assert found.info.status == "FINISHED"
    assert metrics["lm_eval/choice/acc"] == metrics["eval/choice/accuracy"]
    assert metrics["lm_eval/choice/acc_norm"] == metrics["eval/choice/accuracy_norm"]
    wrong = runner.invoke(app, ["evaluate", run_id[:8], "--task", "chioce", "--include", "tasks"])
    assert wrong.exit_code == 2
    assert "lm-eval knows no 'chioce'. Did you mean 'choice'?" in wrong.stderr
