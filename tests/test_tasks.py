"""Questions that the global model answers: their tokens, when they are asked, and where it makes no difference."""

import json
import math
from pathlib import Path

import pytest
from asked import CHOICE, CONTEXT, REPLY, experiment_with, fill, prepared_task, read_from
from questions import WORDS, save_reader, save_rows
from small import PAD
from transformers import AutoTokenizer

from fedloom.jobs.plan import show_plan
from fedloom.platform.base_model import context_length
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import prepare
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.tasks.answers import answer, task_metrics
from fedloom.platform.tasks.questions import prepare_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("questions"))


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def reader(folder):
    return read_from(folder)


def test_prompt_and_choice_are_tokenised_as_one_text(tmp_path, reader):
    """The tokens are those of the whole text, and the choice's begin where those of the prompt's words end."""
    _, tokenizer = reader
    choices = ["a", "B", "the cat", "two red figs"]
    prompts = ["", " ", *(words + end for words in (*WORDS, "the cat", "one dog ?") for end in ("", " ", "\n", "  "))]
    source = save_rows(tmp_path / "q.jsonl", [{"q": prompt, "choices": choices, "answer": 0} for prompt in prompts])
    questions = prepared_task(CHOICE | {"source": str(source), "prompt": "{q}"}).questions

    expected = []
    for prompt in prompts:
        start = [] if prompt.strip() else [tokenizer.eos_token_id]  # there is no first token to predict from but this
        num_given = len(start) + len(tokenizer(prompt.rstrip())["input_ids"])
        expected.append((num_given, [start + tokenizer(f"{prompt} {choice}")["input_ids"] for choice in choices]))
    found = [(q.num_given[0], [sequence.tolist() for sequence in q.sequences]) for q in questions]
    assert sorted(found) == sorted(expected)
    assert all(len(set(q.num_given)) == 1 and q.num_characters == (1, 1, 7, 12) for q in questions)


def test_texts_begin_as_the_tokenizer_has_them_begin(tmp_path, reader):
    """A tokenizer that puts <s> before every text has it before prompts, once, also before those that are cut."""
    _, tokenizer = reader
    save_reader(tmp_path / "model", bos_token="<s>")
    started = AutoTokenizer.from_pretrained(tmp_path / "model")
    from tokenizers.processors import TemplateProcessing

    started._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    plain = prepare_tasks(experiment_with(CHOICE | {"max_length": 12}), tokenizer, CONTEXT)[0].questions
    begun = prepare_tasks(experiment_with(CHOICE | {"max_length": 13}), started, CONTEXT)[0].questions

    assert any(question.cut for question in plain)
    for before, after in zip(plain, begun, strict=True):
        assert [[3, *sequence] for sequence in map(list, before.sequences)] == list(map(list, after.sequences))


@pytest.mark.parametrize("task", [CHOICE, REPLY])
def test_a_prompt_that_does_not_fit_loses_its_beginning(task):
    """What is left ends as the whole does, fills the room, and is equally long for every choice of a question."""
    answers = task.get("max_new_tokens", 0)
    whole = prepared_task(task).questions
    assert not any(question.cut for question in whole)
    cut = prepared_task(task | {"max_length": 12}).questions
    assert sorted(len(q.sequences) for q in whole) == sorted(len(q.sequences) for q in cut)
    assert 0 < sum(question.cut for question in cut) < len(cut)
    for question in cut:
        lengths = [len(sequence) for sequence in question.sequences]
        assert len(set(question.num_given)) == 1
        assert max(lengths) + answers == 12 if question.cut else max(lengths) + answers <= 12
        assert any(
            all(
                given.tolist() == full.tolist()[len(full) - len(given) :]
                for given, full in zip(question.sequences, other.sequences, strict=True)
            )
            for other in whole
            if len(other.sequences) == len(question.sequences)
        )


def test_how_many_prompts_were_cut_is_said(reader):
    model, tokenizer = reader
    task = prepared_task(REPLY | {"max_length": 10})
    scores = [answer(model, tokenizer, shard, 4, pad_token_id=PAD) for shard in task.shards]

    assert task_metrics(task, scores)["eval/reply/cut_prompts"] == sum(q.cut for q in task.questions) > 0


def test_a_sample_of_the_questions_depends_on_the_seed_alone():
    def asked(**changes):
        task = CHOICE | {"max_examples": 5} | changes.pop("task", {})
        return sorted(map(str, (q.sequences for q in prepared_task(task, **changes).questions)))

    assert asked() == asked() == asked(task={"every": 2}) == asked(evaluation={"batch_size": 1})
    assert asked() != asked(seed=1)
    assert len(asked()) == 5
    assert len(asked(task={"max_examples": 500})) == 20


def test_without_a_source_the_held_out_examples_are_asked():
    """The prompts are those that the training data hold out, and their completions are the references."""
    task = REPLY | {"source": None, "prompt": "{prompt}", "answer": "completion"}
    prepared = prepare(experiment_with(task))
    data = prepared.data
    held_out = [data.input_ids[data.offsets[i] : data.offsets[i] + data.labels[i]].tolist() for i in data.test]

    assert sorted(q.sequences[0].tolist() for q in prepared.tasks[0].questions) == sorted(held_out)
    rows = {(row["prompt"], row["completion"]) for row in map(json.loads, Path("rows.jsonl").read_text().splitlines())}
    tokenizer = AutoTokenizer.from_pretrained("model")
    assert {(tokenizer.decode(q.sequences[0]), q.references[0]) for q in prepared.tasks[0].questions} <= rows


@pytest.mark.ray
def test_tasks_are_asked_when_they_are_due_with_the_same_bits_here_and_on_two_actors(ray_local):
    """By default after the last round; with ``every`` from round 0 on and after the last. They change nothing else."""
    experiment = experiment_with(CHOICE, REPLY | {"every": 2}, evaluation={"every": 3})
    silent = experiment_with(evaluation={"every": 3})
    prepared, pools = prepare(experiment), pools_of(experiment)
    executors = {
        "local": lambda: LocalExecutor(prepared.spec, prepared.data, pools),
        "two actors": lambda: RayExecutor(prepared.spec, prepared.data, pools, actors=2),
    }
    results = {}
    for where, start in executors.items():
        executor = start()
        try:
            rounds = list(run(experiment, prepared, executor))
            if where == "local":
                quiet = list(run(silent, prepare(silent), executor))
        finally:
            executor.close()
        results[where] = [{key: v for key, v in done.metrics.items() if key != "seconds"} for done in rounds]

    assert all(len(task.shards) > 1 for task in prepared.tasks)
    names = [
        {key for key in metrics if key.count("/") == 2 and key.startswith("eval/")} for metrics in results["local"]
    ]
    replies, choices = (
        {"eval/reply/exact_match", "eval/reply/rouge_l"},
        {f"eval/choice/{m}" for m in ("accuracy", "accuracy_norm")},
    )
    assert names == [replies, set(), replies, replies | choices]
    assert all(math.isfinite(value) for key, value in results["local"][-1].items() if key in replies | choices)
    assert results["local"] == results["two actors"]
    own = [{key: v for key, v in m.items() if key not in replies | choices} for m in results["local"]]
    assert own == [{key: v for key, v in done.metrics.items() if key != "seconds"} for done in quiet]


def test_the_model_s_context_is_read_from_its_configuration():
    assert context_length(prepare(experiment_with()).spec) == CONTEXT


def test_a_plan_says_what_the_tasks_cost(capsys):
    """Rounds 0, 2 and 3 of three ask a task that is asked every second round."""
    prepared = prepare(experiment_with(CHOICE, REPLY | {"every": 2}))
    choice, reply = prepared.tasks
    assert choice.num_read == sum(len(sequence) for question in choice.questions for sequence in question.sequences)
    assert (choice.num_written, reply.num_written) == (0, 20 * 6)

    show_plan(prepared)

    shown = " ".join(capsys.readouterr().out.split())
    assert f"task choice: 20 questions, asked 1 time; each time {choice.num_read} tokens are read, 0 written" in shown
    assert f"task reply: 20 questions, asked 3 times; each time {reply.num_read} tokens are read, 120 written" in shown
    flop = 2 * prepared.base_parameters * (reply.num_read + 120)
    assert f"in about {flop:.3g} operations" in shown
    assert "answering tasks" in shown
