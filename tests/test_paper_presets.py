"""The papers' presets: every one valid down to its columns and ranks, none of them run."""

import json

import pytest
from conftest import REPOSITORY
from transformers import LlamaConfig, PreTrainedTokenizerFast, RobertaConfig

from fedloom.jobs.presets import experiment_path, preset_titles
from fedloom.platform.builtin import TINY_FOLDER
from fedloom.platform.experiment_file import load_experiment, read_document
from fedloom.platform.preparation import global_rank, prepare
from fedloom.tuning.space import experiment_at, points_of
from fedloom.tuning.sweep_file import load_sweep

NAMES = [name for name in preset_titles() if name.startswith("papers/")]
FULL = [name for name in NAMES if not name.endswith("-small")]
SWEEPS = sorted((REPOSITORY / "jobs" / "presets" / "sweeps").glob("*.yaml"))
MMLU = {"question": "Which is even?", "choices": ["one", "two", "three", "five"], "answer": 1}
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def architectures(tmp_path_factory):
    """A Llama and a RoBERTa wide enough for the published ranks: configuration and tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("architectures")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_FOLDER)
    for name, config in (("llama", LlamaConfig), ("roberta", RobertaConfig)):
        config(vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=514, **SHAPE).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    return folder


def rows_for(experiment):
    """Rows with the columns that an experiment reads; enough of them for its clients."""
    columns, clients = experiment.data.columns, experiment.partition.num_clients
    rows = []
    for i in range(max(1000, 2 * clients)):
        row = {name: f"Word {i} of {name}." for name in columns.model_dump().values() if name is not None}
        row |= {columns.label: "abcdefgh"[i % 8], "split": experiment.data.train_split}
        rows.append(row | ({columns.client: f"c{i % clients}"} if columns.client else {}))
    rows[0:0] = [row | {"split": experiment.data.test_split} for row in rows[:20]]
    return rows


@pytest.mark.parametrize("name", FULL)
def test_a_full_preset_is_sound_but_for_the_hub(name, architectures, tmp_path):
    """On rows of its columns and an architecture of its kind: templates, splits, partition, targets and ranks fit."""
    experiment = load_experiment(experiment_path(name))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_for(experiment)))
    kind = "roberta" if "roberta" in experiment.model.name else "llama"
    changes = [f"model.name={architectures / kind}", f"data.source={path}", "data.subset=null"]
    for index, task in enumerate(experiment.evaluation.tasks):
        if task.source is not None:
            (tmp_path / "mmlu.jsonl").write_text(json.dumps(MMLU))
            keys = {"source": tmp_path / "mmlu.jsonl", "subset": "null", "split": "null"}
            changes += [f"evaluation.tasks.{index}.{key}={value}" for key, value in keys.items()]

    prepared = prepare(load_experiment(experiment_path(name), changes))

    assert len(prepared.clients) == experiment.partition.num_clients
    assert global_rank(prepared.experiment, prepared) >= max(client.rank for client in prepared.clients)
    assert all(profile.num_gpus > 0 for profile in experiment.population.profiles)
    assert prepared.experiment.data.task == "classification" or prepared.experiment.evaluation.tasks


@pytest.mark.parametrize("name", FULL)
def test_a_small_twin_has_the_method_and_the_population_of_the_full_one(name):
    """And it can be run as it stands: nothing is downloaded, no GPU is asked for."""
    full, twin = load_experiment(experiment_path(name)), load_experiment(experiment_path(f"{name}-small"))

    assert twin.method == full.method
    assert twin.adapter.scale == full.adapter.scale
    assert (twin.training.optimizer, twin.training.schedule) == (full.training.optimizer, full.training.schedule)
    assert twin.partition.kind == full.partition.kind
    assert [(p.name, p.share, p.count) for p in twin.population.profiles] == [
        (p.name, p.share, p.count) for p in full.population.profiles
    ]
    prepared = prepare(twin)
    assert twin.cohort.size / len(prepared.clients) == pytest.approx(
        full.cohort.size / full.partition.num_clients, abs=0.01
    )
    assert all(profile.num_gpus == 0 for profile in twin.population.profiles)


def test_every_twin_has_a_full_preset():
    assert {name.removesuffix("-small") for name in NAMES} == set(FULL)
    assert len(NAMES) == 2 * len(FULL) > 0


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_trial_of_a_sweep_is_a_valid_experiment(path):
    sweep = load_sweep(path)
    document = read_document(experiment_path(sweep.experiment))
    base = experiment_at(document, sweep.set, place="base").model_dump(mode="json")
    points = points_of(sweep, base)
    assert len({experiment_at(document, {**sweep.set, **point}, place=path.name).hash for point in points}) == len(
        points
    )
    assert len(points) > 1
