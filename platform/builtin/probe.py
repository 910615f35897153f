"""How fast `builtin:tiny` learns `builtin:stdlib` with an adapter, centrally and on one core.

    python -m fedloom.platform.builtin.probe --seconds 20

A grid of settings, each trained for the same CPU time from the same start. It shows which length, targets and learning
rates suit a demonstration that may take seconds, and that the adapter earns its bytes: `frozen` trains the head alone.
Needs peft besides what the pre-training needs.
"""

import argparse
import itertools
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedloom.platform.builtin import TINY_FOLDER
from fedloom.platform.builtin.areas import AREAS
from fedloom.platform.builtin.stdlib_docs import stdlib_examples

TARGETS = {
    "frozen": (),
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
RANK, SCALE, BATCH = 8, 2, 16

logger = logging.getLogger("fedloom.probe")
Split = tuple[list[list[int]], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One cell of the grid; learning rates are constant, of the factors and of the classifier's head."""

    targets: str
    max_length: int
    learning_rate: float
    head_learning_rate: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per setting."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    train, test = (_encoded(options.model, split) for split in ("train", "test"))
    majority = Counter(train[1]).most_common(1)[0][0]
    logger.info("majority: %.3f of %d test examples", test[1].count(majority) / len(test[1]), len(test[1]))
    grid = itertools.product(options.targets, options.lengths, options.learning_rates, options.head_learning_rates)
    for cell in dict.fromkeys((t, n, 0.0 if t == "frozen" else rate, head) for t, n, rate, head in grid):
        setting = Setting(targets=cell[0], max_length=cell[1], learning_rate=cell[2], head_learning_rate=cell[3])
        probe(setting, train, test, options)
    return 0


def probe(setting: Setting, train: Split, test: Split, options: argparse.Namespace) -> None:
    """Train until the steps are done or the CPU seconds spent, and log the accuracy on the way."""
    model = _model(options.model, TARGETS[setting.targets], seed=options.seed)
    head = [p for name, p in model.named_parameters() if p.requires_grad and "score" in name]
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "score" not in name]
    groups = [{"params": head, "lr": setting.head_learning_rate}, {"params": factors, "lr": setting.learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    cpu_s, marks = 0.0, []
    checkpoints = [options.seconds * share for share in (0.25, 0.5)]
    for step, (rows, labels) in enumerate(_batches(train, setting.max_length, options.seed), start=1):
        started = time.process_time()
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cpu_s += time.process_time() - started if step > 3 else 0.0  # the first steps pay for imports
        if checkpoints and cpu_s >= checkpoints[0]:
            marks.append(f"{accuracy(model, test, setting.max_length):.3f} at {checkpoints.pop(0):.0f} s")
        if step == options.steps or cpu_s >= options.seconds:
            break
    marks.append(f"{accuracy(model, test, setting.max_length):.3f} at {cpu_s:.0f} s")
    logger.info("%s: %s, %d steps of %.0f ms", setting, ", ".join(marks), step, 1000 * cpu_s / max(1, step - 3))


@torch.no_grad()
def accuracy(model: torch.nn.Module, split: Split, max_length: int) -> float:
    """Share of the examples whose label is predicted."""
    model.eval()
    order = sorted(range(len(split[0])), key=lambda index: len(split[0][index]))
    right = 0
    for start in range(0, len(order), 64):
        rows, labels = _padded(split, order[start : start + 64], max_length)
        right += int((model(**rows).logits.argmax(-1) == labels).sum())
    model.train()
    return right / len(order)


def _model(folder: Path, targets: Sequence[str], *, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(AREAS), dtype=torch.float32)
        if targets:
            config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=[*targets], task_type="SEQ_CLS")
            return peft.get_peft_model(model, config).train()  # type: ignore[no-any-return]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("score"))
    return model.train()  # type: ignore[no-any-return]


def _encoded(folder: Path, split: str) -> Split:
    examples = [example for example in stdlib_examples() if example.split == split]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([example.text for example in examples])["input_ids"]
    return ids, [AREAS.index(example.label) for example in examples]


def _batches(split: Split, max_length: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(split[0]), generator=generator).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield _padded(split, order[start : start + BATCH], max_length)


def _padded(split: Split, chosen: Sequence[int], max_length: int) -> tuple[dict[str, Tensor], Tensor]:
    # A text that is cut keeps its last token, the end of the document, as the tokenizer's own truncation does.
    ids_of = [split[0][index] for index in chosen]
    rows = [torch.tensor(ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]) for ids in ids_of]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (batch, longest); the padding token is 0
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([split[1][index] for index in chosen])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fedloom.platform.builtin.probe", description="Probe tiny.")
    parser.add_argument("--model", type=Path, default=TINY_FOLDER, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of training per setting (default 20)")
    parser.add_argument("--steps", type=int, help="stop after so many steps, if that is sooner")
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--head-learning-rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    sys.exit(main())
