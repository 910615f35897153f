"""Laws of what Fedloom carries with it: the data `builtin:stdlib` and the model `builtin:tiny`."""

import collections
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedloom.platform.builtin import TINY_FOLDER, pretrain, probe
from fedloom.platform.builtin.areas import AREA_OF, AREAS
from fedloom.platform.builtin.corpus import Corpus
from fedloom.platform.builtin.docstrings import docstrings, parse
from fedloom.platform.builtin.stdlib_docs import (
    fingerprint,
    pretraining_texts,
    split_of,
    stdlib_examples,
)

SOURCE = '''
"""A module that would fail if it were run."""
raise SystemExit

class Outer(Base, metaclass=Meta):
    """A class of some kind."""

    class Inner:
        """A class within a class."""

        async def wait(self, *, seconds: float = 1.0) -> None:
            """Wait for so many seconds."""

if condition:
    def chosen(a, /, b=(1, 2), *rest):
        """Stand under a condition.

            Indented further.

        Not so here.
        """
        def local():
            """Only the function itself sees this."""
'''


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


def test_docstrings_are_found_without_running_the_source():
    """Each definition gives its qualified name, its signature within the module, and its text without indentation."""
    found = [(d.name, d.module, d.prompt, d.text) for d in parse("_pydecimal.sub", SOURCE)]

    assert found == [
        ("decimal.sub", "decimal", "module decimal.sub:", "A module that would fail if it were run."),
        ("decimal.sub.Outer", "decimal", "class Outer(Base, metaclass=Meta):", "A class of some kind."),
        ("decimal.sub.Outer.Inner", "decimal", "class Outer.Inner:", "A class within a class."),
        (
            "decimal.sub.Outer.Inner.wait",
            "decimal",
            "async def Outer.Inner.wait(self, *, seconds: float=1.0) -> None:",
            "Wait for so many seconds.",
        ),
        (
            "decimal.sub.chosen",
            "decimal",
            "def chosen(a, /, b=(1, 2), *rest):",
            "Stand under a condition.\n\n    Indented further.\n\nNot so here.",
        ),
    ]


@pytest.mark.parametrize("name", ["abc.ABC", "pathlib.Path.exists", "asyncio.run", "json.loads", "socket"])
def test_the_split_is_a_function_of_the_name(name):
    """The first eight bytes of SHA-256, read as a fraction of one, are below 0.2: then it is a test example."""
    fraction = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16

    assert split_of(name) == ("test" if fraction < 0.2 else "train")


def test_a_text_is_a_test_text_if_any_of_its_names_is():
    """Docstrings that are repeated elsewhere in the library cannot stand on both sides of the split."""
    names = collections.defaultdict(set)
    for docstring in docstrings():
        names[docstring.words].add(docstring.name)

    for example in stdlib_examples():
        expected = "test" if "test" in map(split_of, names[example.text]) else "train"
        assert example.split == expected, names[example.text]


def test_no_text_stands_twice():
    """So the splits are disjoint as texts too, and about one example in five is a test example."""
    examples = stdlib_examples()
    num_test = sum(example.split == "test" for example in examples)

    assert len({example.text for example in examples}) == len(examples) > 5000
    assert 0.15 < num_test / len(examples) < 0.25


def test_every_client_has_one_label_and_no_label_rules():
    """Eight areas; a client is a module, and a module lies in one area; guessing the largest is right below 30 %."""
    examples = stdlib_examples()
    counts = collections.Counter(example.label for example in examples)

    assert set(counts) == set(AREAS)
    assert len(AREAS) == 8
    assert max(counts.values()) < 0.3 * len(examples)
    assert min(counts.values()) > 0.05 * len(examples)
    assert all(example.label == AREA_OF[example.client] for example in examples)
    assert len({example.client for example in examples}) > 100


def test_texts_are_one_line_of_several_words_and_completions_keep_their_lines():
    """A text is its completion with the white space collapsed; a prompt is one line that opens a block."""
    for example in stdlib_examples():
        assert example.text == " ".join(example.completion.split())
        assert len(example.text.split()) >= 3
        assert "\n" not in example.prompt
        assert example.prompt.endswith(":")


def test_reading_is_the_same_in_another_process_and_imports_nothing_that_acts():
    """No hash seed, no import order and no library in this process changes the data; `antigravity` opens a browser."""
    code = (
        "import sys; from fedloom.platform.builtin.stdlib_docs import fingerprint, stdlib_examples;"
        "print(fingerprint(stdlib_examples())); print({'antigravity', 'this', 'tkinter', 'idlelib'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == [fingerprint(stdlib_examples()), "set()"]


def test_the_fingerprint_names_the_content_not_its_order():
    """Any changed field changes it; the order of the examples does not."""
    examples = stdlib_examples()[:50]

    assert fingerprint(examples) == fingerprint(examples[::-1])
    assert fingerprint(examples) != fingerprint(examples[1:])
    for field in ("text", "label", "prompt", "completion", "client", "split"):
        assert fingerprint([replace(examples[0], **{field: "other"}), *examples[1:]]) != fingerprint(examples)


def test_the_caller_of_stdlib_examples_owns_the_list():
    """What is cached is not what is handed out."""
    stdlib_examples().clear()

    assert stdlib_examples()


def test_pre_training_never_reads_a_test_text():
    """Neither the words of a test example, nor anything under a name of the test split."""
    test_words = {example.text for example in stdlib_examples() if example.split == "test"}
    read = {" ".join(text.split()) for text in pretraining_texts()}
    train_words = {example.text for example in stdlib_examples() if example.split == "train"}

    assert not read & test_words
    assert train_words <= read


def test_held_out_text_is_not_trained_on():
    """The part that decides when to stop is a few per cent of the documents, and disjoint from the rest."""
    corpus = Corpus.load()

    assert not set(corpus.train) & set(corpus.held_out)
    assert 0.02 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.06


def test_the_folder_is_small():
    """At most 4 MB, so that a clone and a wheel stay light."""
    assert sum(path.stat().st_size for path in TINY_FOLDER.iterdir()) < 4_000_000


def test_the_model_loads_as_both_families_in_single_precision(tokenizer):
    """A causal language model with tied embeddings, and a classifier that finds the end of a padded row."""
    causal = AutoModelForCausalLM.from_pretrained(TINY_FOLDER)
    classifier = AutoModelForSequenceClassification.from_pretrained(TINY_FOLDER, num_labels=8).eval()
    batch = tokenizer(
        ["Close the file.", "Return the number of bytes that were read."], padding=True, return_tensors="pt"
    )
    alone = tokenizer("Close the file.", return_tensors="pt")

    assert {parameter.dtype for parameter in causal.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    assert 1.5e6 < sum(parameter.numel() for parameter in causal.parameters()) < 1.7e6
    assert causal.config.max_position_embeddings >= 256
    assert causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(classifier(**batch).logits[:1], classifier(**alone).logits)


def test_the_tokenizer_gives_every_text_back(tokenizer):
    """Byte-level: no unknown token; padding is a token that no text contains, and every text ends with the end."""
    text = "Return f(x) — naïve,\n\n    indented;\ttabs, 数, \N{SNAKE}  two spaces ."
    *ids, last = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert last == tokenizer.eos_token_id == tokenizer(text, max_length=5, truncation=True)["input_ids"][4]
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(TINY_FOLDER).config.vocab_size == 2048
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token_id not in {None, tokenizer.pad_token_id}
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)


def test_the_model_predicts_unseen_texts_better_than_word_counts_can(tokenizer):
    """Its loss on test texts is below the entropy of their tokens, which no model without context can beat."""
    texts = [example.completion for example in stdlib_examples() if example.split == "test"][::20]
    ids = tokenizer("<|end|>".join(texts), return_tensors="pt")["input_ids"][0, :16_384]
    blocks = ids[: len(ids) // 128 * 128].view(-1, 128)
    shares = torch.unique(blocks, return_counts=True)[1] / blocks.numel()
    entropy = -(shares * shares.log()).sum().item()

    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(TINY_FOLDER)(input_ids=blocks, labels=blocks).loss.item()

    assert loss < entropy < math.log(2048)


def test_three_steps_of_pre_training_leave_a_folder_that_loads(tmp_path):
    """The folder has the shape of the one in the repository; the text may come from a file, as on another machine."""
    text, out = tmp_path / "text.json", tmp_path / "tiny"
    assert pretrain.main(["--write-text", str(text)]) == 0
    assert Corpus.load(text) == Corpus.load()
    written = json.loads(text.read_text())
    text.write_text(json.dumps(written | {"texts": written["texts"][:600]}))  # enough for 2,048 entries, and quick

    assert pretrain.main(["--out", str(out), "--text", str(text), "--steps", "3", "--device", "cpu"]) == 0

    assert {path.name for path in out.iterdir()} == {path.name for path in TINY_FOLDER.iterdir()}
    trained, shipped = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, TINY_FOLDER))
    assert {n: p.shape for n, p in trained.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    assert f"fingerprint {Corpus.load(text).fingerprint}" in (out / "README.md").read_text()


def test_pre_training_explains_what_it_cannot_do(tmp_path, capsys):
    """Bad options are refused before anything is read, with the remedy."""
    with pytest.raises(SystemExit):
        pretrain.main(["--out", str(tmp_path), "--text", str(tmp_path / "absent.json")])

    assert "--write-text" in capsys.readouterr().err


def test_the_probe_prints_a_line_for_every_setting(caplog):
    """Majority first; the frozen base has one learning rate only, that of its head."""
    caplog.set_level("INFO", logger="fedloom.probe")

    probe.main(["--steps", "1", "--lengths", "4", "--learning-rates", "1e-3", "3e-3", "--head-learning-rates", "1e-3"])

    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("majority: 0.")
    assert [line.split("'")[1] for line in lines[1:]] == ["all", "all", "frozen", "qv", "qv"]
