"""From rows to questions: what counts as an answer, and what is refused with its key or row before a run."""

import pytest
from asked import CHOICE, CONTEXT, fill, prepared_task
from questions import WORDS, save_rows

from fedloom.platform.errors import DataError, ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.tasks.questions import prepare_tasks

QUESTION = {"question": "the cat", "choices": ["red", "hot"], "answer": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("questions"))


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


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
