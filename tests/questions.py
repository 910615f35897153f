"""A language model that can read and write: the little Llama with a tokenizer, and files of questions."""

import json

from small import PAD, VOCABULARY, save_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCE = "the cat sat on a mat and saw one dog eat two red figs in hot sun"
WORDS = SENTENCE.split()


def save_reader(folder, **special):
    """Save the little Llama with a byte-pair tokenizer of its vocabulary, in which a word begins with its space."""
    save_llama(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    names = ["<unk>", "<pad>", "</s>", "<s>"]
    assert names.index("<pad>") == PAD
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([f"{SENTENCE} A B C D ? . :"] * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", **special
    ).save_pretrained(folder)
    return folder


def save_rows(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_questions(count):
    """Make questions with two to four choices of different lengths."""
    return [
        {
            "question": " ".join(WORDS[i % 7 : i % 7 + 2 + i % 4]),
            "choices": [" ".join(WORDS[(3 * i + k) % 14 : (3 * i + k) % 14 + 1 + k % 3]) for k in range(2 + i % 3)],
            "answer": i % 2,
            "reply": WORDS[i % 17],
        }
        for i in range(count)
    ]
