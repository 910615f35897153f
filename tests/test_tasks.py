"""Questions that the global model answers: what is asked, how it is scored, and where it makes no difference."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from questions import WORDS, save_reader, save_rows, some_questions
from rouge_score.rouge_scorer import RougeScorer
from small import PAD, make_experiment
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.jobs.plan import show_plan
from fedloom.platform.base_model import context_length
from fedloom.platform.driver import run
from fedloom.platform.errors import DataError, ExperimentError
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import prepare
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.tasks.answers import answer, log_likelihoods, task_metrics
from fedloom.platform.tasks.generation import exact_match, generate, rouge_l
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model, questions and texts to train on; the experiments name them by file."""
    place = tmp_path_factory.mktemp("questions")
    save_reader(place / "model")
    save_rows(place / "questions.jsonl", some_questions(20))
    save_rows(
        place / "rows.jsonl",
        [{"prompt": f"{WORDS[i % 17]} ?", "completion": f" {WORDS[i % 5]} {WORDS[i % 3]}"} for i in range(60)],
    )
    return place


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def reader(folder):
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


def slow_log_likelihood(model, tokens, num_given):
    """Add up log p(token | all before it), one forward pass for every token."""
    found = 0.0
    for position in range(num_given, len(tokens)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[:position].tolist()])).logits[0, -1]
        found += float(logits.log_softmax(-1)[tokens[position]])
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_likelihoods_are_sums_over_the_choice_s_tokens_whatever_the_batch(reader, batch_size):
    model, _ = reader
    questions = prepared_task(CHOICE, evaluation={"batch_size": 5}).questions
    sequences = [sequence for question in questions for sequence in question.sequences]
    num_given = [given for question in questions for given in question.num_given]

    found = log_likelihoods(model, sequences, num_given, batch_size, pad_token_id=PAD)

    assert len(set(map(len, sequences))) > 3, "there is something to pad"
    expected = [slow_log_likelihood(model, *each) for each in zip(sequences, num_given, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_accuracy_is_the_share_of_right_choices_by_sum_and_by_sum_over_characters(reader):
    model, tokenizer = reader
    rows = some_questions(20)
    picks: list[int] = []
    picks_by_character: list[int] = []
    for row in rows:
        prompt = tokenizer(f"{row['question']} ?")["input_ids"]
        sums = []
        for choice in row["choices"]:
            whole = np.array(tokenizer(f"{row['question']} ? {choice}")["input_ids"])
            sums.append(slow_log_likelihood(model, whole, len(prompt)))
        lengths = [len(choice) for choice in row["choices"]]
        picks.append(int(np.argmax(sums)))
        picks_by_character.append(int(np.argmax(np.divide(sums, lengths))))
    task = prepared_task(CHOICE)

    scores = [answer(model, tokenizer, shard, 4, pad_token_id=PAD) for shard in task.shards]

    assert len(scores) > 1
    assert task_metrics(task, scores) == {
        "eval/choice/accuracy": np.mean([pick == row["answer"] for pick, row in zip(picks, rows, strict=True)]),
        "eval/choice/accuracy_norm": np.mean(
            [pick == row["answer"] for pick, row in zip(picks_by_character, rows, strict=True)]
        ),
    }
    assert picks != picks_by_character, "the two measures are told apart"


def slow_text(model, tokenizer, prompt, max_new_tokens, stop):
    """Write one token after the other, without a cache, without a batch."""
    tokens, text = prompt.tolist(), ""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            chosen = int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if chosen == tokenizer.eos_token_id:
            break
        tokens.append(chosen)
        text = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
        if any(string in text for string in stop):
            break
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_generation_with_cache_and_batches_is_one_token_after_the_other(reader, batch_size):
    model, tokenizer = reader
    prompts = [question.sequences[0] for question in prepared_task(REPLY).questions]
    assert len(set(map(len, prompts))) > 3, "there is something to pad"
    free = [slow_text(model, tokenizer, prompt, 6, ()) for prompt in prompts]
    stop = (free[0][2:4], free[-1][3:5])  # they end some texts within a token and are met by others never
    stopped = [slow_text(model, tokenizer, prompt, 6, stop) for prompt in prompts]
    settings = {"max_new_tokens": 6, "pad_token_id": PAD}

    assert free == generate(model, tokenizer, prompts, batch_size, stop=(), **settings)
    assert stopped == generate(model, tokenizer, prompts, batch_size, stop=stop, **settings)
    assert stopped != free


def test_generation_leaves_the_checkpoint_s_own_wishes_aside(reader):
    """Sampling, a ban on repetition and a shortest length that came with the model change nothing."""
    model, tokenizer = reader
    prompts = [question.sequences[0] for question in prepared_task(REPLY).questions]
    settings = {"max_new_tokens": 6, "stop": (), "pad_token_id": PAD}
    before = generate(model, tokenizer, prompts, 8, **settings)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1)

    assert before == generate(model, tokenizer, prompts, 8, **settings)


def test_a_generation_ends_with_the_sentence(reader):
    """The end-of-sequence token ends a text, and nothing after it counts."""
    model, tokenizer = reader
    prompts = [question.sequences[0] for question in prepared_task(REPLY).questions]
    free = generate(model, tokenizer, prompts, 8, max_new_tokens=6, stop=(), pad_token_id=PAD)
    first = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in free if text]
    ended = AutoTokenizer.from_pretrained("model", eos_token=tokenizer.convert_ids_to_tokens(first[0]))

    again = generate(model, ended, prompts, 8, max_new_tokens=6, stop=(), pad_token_id=PAD)

    assert again == [slow_text(model, ended, prompt, 6, ()) for prompt in prompts]
    assert again != free


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("Paris", "paris", True),
        ("  the  red\nfig. ", "The red fig", True),
        ("3.5", "35", False),
        ("-5", "5", False),
        ("red figs", "red fig", False),
        ("", "", True),
        ("STRASSE", "straße", True),
    ],
)
def test_exact_match_forgives_case_white_space_and_the_full_stop_alone(text, reference, same):
    assert exact_match(text, reference) is same
    assert exact_match(reference, text) is same


@pytest.mark.parametrize(
    ("text", "reference", "common"),
    [
        ("police kill the gunman", "police killed the gunman", 3),  # Lin 2004, section 3.1: S2
        ("the gunman kill police", "police killed the gunman", 2),  # S3: the same words in another order
        ("the cat", "dogs bark", 0),
        ("The cat, sat!", "the cat sat", 3),
        ("Der Bär schläft", "der bär", 2),
        ("", "the cat", 0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(text, reference, common):
    """With a subsequence of L words of m and n, precision L / m and recall L / n: F = 2 L / (m + n)."""
    words = len(text.split()) + len(reference.split())
    assert rouge_l(text, reference) == pytest.approx(2 * common / words)


@given(text=st.text("ab c.", max_size=30), reference=st.text("ab c.", max_size=30))
def test_rouge_l_of_ascii_texts_is_the_package_s_own(text, reference):
    own = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert rouge_l(text, reference) == own == pytest.approx(rouge_l(reference, text))


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


QUESTION = {"question": "the cat", "choices": ["red", "hot"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (QUESTION, {}),
        (QUESTION | {"answer": "hot"}, {}),
        (QUESTION | {"answer": "1"}, {}),
        (QUESTION | {"answer": True}, {}),
        (QUESTION | {"choices": ["2", "1"]} | {"answer": "1"}, {}),  # word for word comes before an index
        (QUESTION | {"answer": "B"}, {"labels": ["A", "B"]}),
        (QUESTION | {"choices": {"text": ["red", "hot"], "label": ["1", "2"]}, "answer": "2"},
         {"choices": "choices.text", "labels": "choices.label"}),
        ({"question": "the cat", "one": "red", "two": "hot", "answer": 1}, {"choices": ["{one}", "{two}"]}),
        (QUESTION, {"prompt": "{question} A. {choices[0]} B. {choices[1]} ?", "choices": ["A", "B"]}),
        ({"a question": "the cat", "q.choices": ["red", "hot"], "answer": 1},
         {"prompt": "{a question}", "choices": "q.choices"}),
    ],
)  # fmt: skip
def test_answers_are_indices_words_or_labels(tmp_path, row, task):
    source = save_rows(tmp_path / "one.jsonl", [row])
    [question] = prepared_task(CHOICE | {"source": str(source)} | task).questions

    assert question.right == 1
    assert len(question.sequences) == 2


@pytest.mark.parametrize(
    ("change", "row", "message"),
    [
        ({"prompt": "{qestion}"}, {}, r"tasks\.0\.prompt: .* no column 'qestion'\. Did you mean 'question'\?"),
        ({"answer": "anser"}, {}, r"tasks\.0\.answer: .*Did you mean 'answer'\?"),
        ({"choices": "options"}, {}, r"tasks\.0\.choices: .* no column 'options'"),
        ({}, {"answer": 2}, r"answer: row 2 of one\.jsonl has the answer 2; it must be .* an index from 0 to 1"),
        ({}, {"answer": -1}, r"has the answer -1"),
        ({"answer": "word"}, {"word": "cold"}, r"answer 'cold'; it must be one of the choices \('red', 'hot'\)"),
        ({"answer": "word", "labels": ["hot", "B"]}, {"word": "C"}, r"one of the labels \('hot', 'B'\)"),
        ({"labels": ["A", "B", "C"]}, {}, r"labels: row 1 of one\.jsonl has 2 choices, but 3 labels"),
        ({"choices": "question"}, {}, r"choices: row 1 of one\.jsonl has no list in 'question'"),
        ({"prompt": "{choices}"}, {}, r"more than one value in 'choices'; name a part, e\.g\. choices\[0\]"),
        ({"prompt": "{choices[7]}"}, {}, r"has no value in 'choices\[7\]'"),
        ({}, {"question": None}, r"prompt: row 2 of one\.jsonl has no value in 'question'"),
        ({}, {"choices": ["red", ""]}, r"choices: row 2 .* two or more are needed, none empty"),
        ({}, {"choices": ["red"], "answer": 0}, r"two or more are needed"),
        ({"source": "nowhere.jsonl"}, {}, r"tasks\.0\.source: there is no file"),
        ({"split": "test"}, {}, r"tasks\.0\.split: one\.jsonl has no column 'split'"),
        ({"max_length": 33}, {}, r"tasks\.0\.max_length: 33 is more than the 32 tokens"),
        ({"max_length": 3}, {"choices": ["two red figs", "dog"]}, r"max_length: row 2 .* a choice of \d tokens"),
        ({"kind": "generation", "max_new_tokens": 32}, {}, r"max_new_tokens: 32 leaves no token .* at most 31"),
        ({"kind": "generation", "max_new_tokens": 4, "answer": "choices"}, {"choices": []},
         r"answer: row 2 .* has no answer in 'choices'"),
        ({"separator": "", "prompt": "{word}", "choices": ["{word}", "e"]}, {"word": "h"}, r"separator: .* joins"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_a_machine_is_needed(tmp_path, change, row, message):
    """The message names the task's key and the row, counted from 1."""
    source = save_rows(tmp_path / "one.jsonl", [QUESTION | {"word": "hot"}, QUESTION | {"word": "hot"} | row])
    with pytest.raises((DataError, ExperimentError), match=message):
        prepared_task(CHOICE | {"source": str(source)} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "eval/x"}, r"key evaluation\.tasks\.0\.name"),
        ({"kind": "cloze"}, r"key evaluation\.tasks\.0\.kind: 'cloze' is not allowed"),
        ({"promt": "{q}"}, r"key evaluation\.tasks\.0\.promt: unknown key\. Did you mean 'prompt'\?"),
        ({"prompt": "{question"}, r"expected '}' before end of string"),
        ({"prompt": "{question!r}"}, r"\{question\} must be a column alone"),
        ({"prompt": "{question:>9}"}, r"must be a column alone"),
        ({"prompt": "{}"}, r"must be a column alone"),
        ({"choices": ["{one}"]}, r"key evaluation\.tasks\.0\.choices"),
        ({"answer": "{answer}"}, r"'\{answer\}' is no column"),
        ({"stop": ["x"]}, r"stop belongs to tasks of kind 'generation', not 'multiple_choice'"),
        ({"source": None, "split": "test"}, r"set source as well"),
    ],
)
def test_what_is_written_wrong_is_refused_with_its_key(change, message):
    document = {"evaluation": {"tasks": [CHOICE | change]}}
    with pytest.raises(ExperimentError, match=message):
        validated(document, place="mine.yaml")


def test_two_tasks_of_one_name_and_a_classifier_are_refused():
    with pytest.raises(ExperimentError, match="two tasks called 'choice'"):
        validated({"evaluation": {"tasks": [CHOICE, CHOICE]}}, place="mine.yaml")
    experiment = Experiment.model_validate({"evaluation": {"tasks": [CHOICE]}})
    with pytest.raises(ExperimentError, match=r"data\.task is 'classification'"):
        prepare_tasks(experiment, None, CONTEXT)


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


@pytest.mark.parametrize("kind", ["column", "folder"])
def test_a_split_is_a_column_s_value_or_a_dataset_s_part(tmp_path, kind):
    rows = [QUESTION | {"question": word} for word in WORDS[:6]]
    if kind == "column":
        parts = [row | {"split": "validation" if i < 2 else "test"} for i, row in enumerate(rows)]
        source = save_rows(tmp_path / "q.jsonl", parts)
    else:
        source = tmp_path / "dataset"
        source.mkdir()
        save_rows(source / "validation.jsonl", rows[:2])
        save_rows(source / "test.jsonl", rows[2:])
    task = CHOICE | {"source": str(source)}

    assert len(prepared_task(task | {"split": "validation"}).questions) == 2
    assert len(prepared_task(task | {"split": "test"}).questions) == 4
    assert len(prepared_task(task).questions) == (6 if kind == "column" else 4)
    with pytest.raises(DataError, match=r"tasks\.0\.split: .* no split 'valdation'\. Did you mean 'validation'\?"):
        prepared_task(task | {"split": "valdation"})


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
