"""The command line in processes of its own, and a folder in which it has something to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from forked import Forked
from small import save_llama

ROOT = Path(__file__).parents[1]


def started(*arguments, cwd, **variables):
    """Start the command line in a process of its own, with the checkout importable."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | variables
    arguments = [str(argument) for argument in arguments]
    if "HOME" not in variables:  # which libraries read when they are imported
        return Forked("fedloom.jobs.main", arguments, cwd=cwd, environment=environment)
    command = [sys.executable, "-m", "fedloom.jobs.main", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def fedloom(*arguments, cwd, **variables):
    """Run the command line to its end."""
    process = started(*arguments, cwd=cwd, **variables)
    output, errors = process.communicate(timeout=170)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def make_world(folder):
    """Fill a folder with a small model, its tokenizer, a labelled JSONL file and an experiment over them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "<pad>", "</s>", *"abcdefghijklmnop"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_llama(folder / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    letters = "abcdefghijklmnop"
    rows = [
        {"text": f"{letters[i % 16]} {letters[i % 7]} {letters[i % 5]}", "label": "xy"[i % 16 % 2], "site": f"s{i % 6}"}
        for i in range(240)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "rounds": 2,
        "model": {"name": "model"},
        "data": {"source": "rows.jsonl", "columns": {"client": "site"}},
        "population": {"profiles": [{"name": "s", "share": 1, "rank": 2}, {"name": "l", "share": 1, "rank": 4}]},
        "cohort": {"size": 3},
        "training": {"learning_rate": 0.01, "batch_size": 8, "steps": 2},
        "method": {"name": "flexlora"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(document))
    return folder
