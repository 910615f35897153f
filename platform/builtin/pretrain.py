"""Pre-train `builtin:tiny` from the text of the Python that runs.

    python -m fedloom.platform.builtin.pretrain --out DIR --device cuda --minutes 4

Needs torch, transformers, tokenizers and safetensors, and nothing else that Fedloom depends on.
"""

import argparse
import json
import logging
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom.platform.builtin.card import model_card
from fedloom.platform.builtin.corpus import END, PAD, Corpus, token_stream, train_tokenizer, write_texts
from fedloom.platform.builtin.training import (
    BLOCK_TOKENS,
    Recipe,
    Run,
    held_out_loss,
    new_model,
    train_steps,
    train_until_no_better,
)

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.5

logger = logging.getLogger("fedloom.pretrain")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the tokenizer and the model; leave a Hugging Face folder with a model card."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if options.write_text:
        logger.info("%d texts in %s", write_texts(options.write_text), options.write_text)
        return 0
    corpus = Corpus.load(options.text)
    tokenizer = train_tokenizer(corpus.train)
    train, held_out = token_stream(tokenizer, corpus.train), token_stream(tokenizer, corpus.held_out)
    logger.info("%d tokens to train on, %d held out", len(train), len(held_out))
    if len(train) < 2 * BLOCK_TOKENS or len(held_out) < 2:
        logger.error("error: %s: too little text; %d tokens are needed", options.text or "Python", 2 * BLOCK_TOKENS)
        return 2
    recipe = _recipe(options)
    if options.steps:
        run = train_steps(recipe, train, held_out, steps=options.steps)
    else:
        run = train_until_no_better(recipe, train, held_out, seconds=60 * options.minutes)
    save(run, tokenizer, options.out)
    # What counts is the folder: bfloat16 has rounded the weights.
    loss = held_out_loss(LlamaForCausalLM.from_pretrained(options.out).to(recipe.device), held_out)
    bits_per_byte = loss / math.log(2) * len(held_out) / sum(len(text.encode()) for text in corpus.held_out)
    facts = {
        "held-out loss, nats per token": round(loss, 4),
        "held-out loss, bits per byte": round(bits_per_byte, 4),
        **_cost(run, recipe, num_tokens=len(train)),
        "text": f"Python {corpus.python}, {len(corpus.train):,} documents, fingerprint {corpus.fingerprint}",
        "tokens of text": len(train),
        "tokens held out": len(held_out),
        "command": "`python -m fedloom.platform.builtin.pretrain " + _shown(options) + "`",
    }
    logger.info("%s", json.dumps(facts, indent=1))
    (options.out / "README.md").write_text(model_card(facts), encoding="utf-8")
    return 0


def save(run: Run, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer; weights as bfloat16, under a configuration that has them loaded as float32."""
    model = new_model(seed=0)
    model.load_state_dict(run.weights)
    model.to(torch.bfloat16).save_pretrained(folder)
    _edit(folder / "config.json", dtype="float32")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _edit(path: Path, **changes: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def _recipe(options: argparse.Namespace) -> Recipe:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    return Recipe(
        device=device,
        bfloat16=options.bfloat16 or device == "cuda",
        batch_blocks=64 if device == "cuda" else 8,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        seed=options.seed,
    )


def _cost(run: Run, recipe: Recipe, *, num_tokens: int) -> dict[str, object]:
    seen = run.best_step * recipe.batch_tokens
    return {
        "parameters": sum(parameter.numel() for parameter in new_model(recipe.seed).parameters()),
        "steps": f"{run.best_step:,} of {run.steps:,}, {recipe.batch_blocks} blocks of {BLOCK_TOKENS} tokens each",
        "tokens seen": seen,
        "epochs": round(seen / num_tokens, 1),
        "seconds": round(run.seconds),
        "products in": "bfloat16" if recipe.bfloat16 else "float32",
        "recipe": f"AdamW, learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, warm-up and "
        f"cosine, seed {recipe.seed}",
        "device": torch.cuda.get_device_name() if recipe.device == "cuda" else "CPU",
        "trained with": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }


def _shown(options: argparse.Namespace) -> str:
    """Repeat the options as one would type them, without the names of folders and files."""
    length = {"steps": options.steps} if options.steps else {"minutes": options.minutes}
    paths = {"out": "DIR"} | ({"text": "FILE"} if options.text else {})
    numbers = {"seed": options.seed, "learning-rate": options.learning_rate, "weight-decay": options.weight_decay}
    shown = {**paths, "device": options.device, **length, **numbers}
    return " ".join(f"--{name} {value}" for name, value in shown.items()) + (" --bfloat16" if options.bfloat16 else "")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fedloom.platform.builtin.pretrain", description="Pre-train tiny.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="folder to write")
    task.add_argument("--write-text", type=Path, metavar="FILE", help="write this Python's text and stop")
    parser.add_argument("--text", type=Path, metavar="FILE", help="read a text that --write-text wrote elsewhere")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=4.0, help="wall-clock time for training (default 4)")
    length.add_argument("--steps", type=int, help="one run of so many steps instead")
    parser.add_argument("--bfloat16", action="store_true", help="take products in bfloat16 (on CUDA always)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"peak (default {LEARNING_RATE})")
    parser.add_argument("--weight-decay", type=float, default=WEIGHT_DECAY, help=f"default {WEIGHT_DECAY}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if options.text and not options.text.is_file():
        parser.error(f"--text {options.text}: no such file; make one with --write-text {options.text}")
    if options.minutes <= 0 or (options.steps is not None and options.steps < 1):
        parser.error("--minutes and --steps must be above 0")
    return options


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
