"""From texts to tokens: what is learnt, what is cut, and how texts are joined and worded."""

from pathlib import Path

import numpy as np
import pytest
from animals import TOKENIZER, WITH_BOS, make_rows, make_tokenizer, prepare, save, texts_of, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.platform.data.federated import FederatedData
from fedloom.platform.data.tokens import tokenize
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment_data import DataSection
from fedloom.platform.experiment_file import validated


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("data") / "animals.jsonl", make_rows())


@pytest.fixture(scope="module")
def answers(source) -> FederatedData:
    return prepare(source, task="causal_lm")


def test_the_completion_and_the_end_are_learnt_and_the_prompt_is_not(answers):
    """The boundary between prompt and completion is exact."""
    for index in range(len(answers.labels)):
        prompt, completion = (
            TOKENIZER.decode(part) for part in np.split(tokens_of(answers, index), [answers.labels[index]])
        )

        assert prompt.startswith("What")
        assert prompt.endswith("?")
        assert completion in {"It runs.</s>", "It sings.</s>", "It sleeps.</s>"}


def test_the_prompt_is_learnt_if_asked(source, answers):
    """`train_on_prompt` changes which tokens carry loss and nothing else."""
    data = prepare(source, task="causal_lm", train_on_prompt=True)

    assert not data.labels.any()
    np.testing.assert_array_equal(data.input_ids, answers.input_ids)


def test_a_text_alone_is_learnt_whole(tmp_path):
    """Without prompt and completion columns, causal_lm learns the text."""
    rows = [{"text": row["text"], "writer": row["writer"]} for row in make_rows()]

    data = prepare(save(tmp_path / "texts.jsonl", rows), task="causal_lm")

    assert not data.labels.any()
    assert {row["text"] + "</s>" for row in rows} == set(texts_of(data, np.arange(60)))


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text("ab ", max_size=30),
    completion=st.text("ab ", max_size=30),
    max_length=st.integers(2, 40),
    tokenizer=st.sampled_from([TOKENIZER, WITH_BOS]),
)
def test_truncation_leaves_half_to_the_completion(prompt, completion, max_length, tokenizer):
    """The prompt loses its beginning, the completion its end, and neither loses what the other does not use."""
    data = DataSection(task="causal_lm", max_length=max_length)
    start = [tokenizer.bos_token_id] if tokenizer is WITH_BOS else []
    given_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    learnt_ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    tokens = tokenize(data, tokenizer, [prompt], [completion])

    boundary = int(tokens.num_silent[0])
    before, learnt = tokens.input_ids[len(start) : boundary].tolist(), tokens.input_ids[boundary:].tolist()
    assert tokens.input_ids[: len(start)].tolist() == start
    assert before == given_ids[len(given_ids) - len(before) :]
    assert learnt == learnt_ids[: len(learnt)]
    assert len(learnt) >= min(len(learnt_ids), max_length / 2)
    assert len(tokens.input_ids) == min(len(start) + len(given_ids) + len(learnt_ids), max_length)


def test_classification_takes_the_tokenizers_special_tokens(source):
    """Texts are tokenised as the tokenizer itself does it, and cut to max_length."""
    data = prepare(source, tokenizer=WITH_BOS, max_length=3)
    first = make_rows()[0]["text"]

    assert tokens_of(data, 0) == WITH_BOS(first, truncation=True, max_length=3)["input_ids"]
    assert tokens_of(data, 0)[0] == WITH_BOS.bos_token_id


def test_two_texts_are_joined_as_the_tokenizer_joins_them(tmp_path):
    """A premise and a hypothesis: tokenised as the tokenizer's own pair, also where they are cut."""
    path = save(tmp_path / "pairs.jsonl", make_rows())
    for max_length in (128, 6):
        data = prepare(path, max_length=max_length, columns={"text": "text", "text_pair": "completion"})
        first = make_rows()[0]
        expected = TOKENIZER(first["text"], first["completion"], truncation=True, max_length=max_length)["input_ids"]
        assert tokens_of(data, 0) == expected
        assert len(expected) <= max_length
    np.testing.assert_array_equal(data.labels, prepare(path).labels)


def test_a_template_words_the_instruction_and_its_input(tmp_path):
    """Alpaca's wording; a row without an input gets the shorter one, and braces are text."""
    rows = [{"ask": f"Say {{i}} {i}", "given": "this" if i % 2 else "", "answer": "So."} for i in range(40)]
    path = save(tmp_path / "asked.jsonl", rows)
    columns = {"client": None, "prompt": "ask", "completion": "answer"}
    options = {"task": "causal_lm", "template": "alpaca", "partition": {"kind": "iid", "num_clients": 2}}
    both = prepare(path, max_length=512, columns={**columns, "input": "given"}, **options)
    alone = prepare(path, max_length=512, columns=columns, **options)

    for data, longer in ((both, {True, False}), (alone, {False})):
        texts = texts_of(data, np.arange(40))
        assert all(text.endswith("\n\n### Response:\nSo.</s>") for text in texts)
        assert all("\n\n### Instruction:\nSay {i} " in text for text in texts)
        assert {"\n\n### Input:\nthis\n\n### Response:" in text for text in texts} == longer
        assert {"paired with an input" in text for text in texts} == longer


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"task": "causal_lm", "columns": {"text_pair": "b"}}, "text_pair is read in classification"),
        ({"template": "alpaca"}, "data.template is for causal_lm"),
        ({"task": "causal_lm", "columns": {"input": "b"}}, "set data.template: alpaca"),
        ({"task": "causal_lm", "template": "alpacca"}, "template"),
    ],
)
def test_columns_that_a_task_does_not_read_are_refused(data, said):
    with pytest.raises(ExperimentError, match=said):
        validated({"data": data}, place="x.yaml")


def test_padding_falls_back_to_the_end_of_sequence(source):
    """GPT-2 and Llama have no padding token; the attention mask hides what stands there."""
    tokenizer = make_tokenizer(pad=False)

    assert prepare(source, tokenizer=tokenizer).pad_token_id == tokenizer.eos_token_id
