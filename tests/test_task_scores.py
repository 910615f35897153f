"""How questions are scored: log-likelihoods of choices, generated texts, and the measures of both."""

import numpy as np
import pytest
import torch
from asked import CHOICE, REPLY, fill, prepared_task, read_from
from hypothesis import given
from hypothesis import strategies as st
from questions import some_questions
from rouge_score.rouge_scorer import RougeScorer
from small import PAD
from transformers import AutoTokenizer

from fedloom.platform.tasks.answers import answer, log_likelihoods, task_metrics
from fedloom.platform.tasks.generation import exact_match, generate, rouge_l


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("questions"))


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def reader(folder):
    return read_from(folder)


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
