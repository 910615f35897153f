"""Tasks for a little Llama: two of them, an experiment that asks them, and its questions."""

import torch
from questions import WORDS, save_reader, save_rows, some_questions
from small import make_experiment
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.platform.tasks.questions import prepare_tasks

CONTEXT = 32  # tokens that the little Llama says it can read
CHOICE = {"name": "choice", "kind": "multiple_choice", "source": "questions.jsonl", "prompt": "{question} ?"}
REPLY = {
    "name": "reply",
    "kind": "generation",
    "source": "questions.jsonl",
    "prompt": "{question} :",
    "answer": "reply",
    "max_new_tokens": 6,
}


def fill(place):
    """Put a model, questions and texts to train on into a folder; the experiments name them by file."""
    save_reader(place / "model")
    save_rows(place / "questions.jsonl", some_questions(20))
    save_rows(
        place / "rows.jsonl",
        [{"prompt": f"{WORDS[i % 17]} ?", "completion": f" {WORDS[i % 5]} {WORDS[i % 3]}"} for i in range(60)],
    )
    return place


def read_from(folder):
    """Return the model in float64, so that rounding hides nothing, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double().eval()
    with torch.no_grad():  # what the little model writes depends on what it reads only if its weights are larger
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model, AutoTokenizer.from_pretrained(folder / "model")


def experiment_with(*tasks, **changes):
    evaluation = {"batch_size": 4, "tasks": tasks, **changes.pop("evaluation", {})}
    return make_experiment(
        "model",
        data={"source": "rows.jsonl", "task": "causal_lm"},
        partition={"kind": "iid", "num_clients": 6},
        evaluation=evaluation,
        **changes,
    )


def prepared_task(task, **changes):
    tokenizer = AutoTokenizer.from_pretrained("model")
    return prepare_tasks(experiment_with(task, **changes), tokenizer, CONTEXT)[0]
