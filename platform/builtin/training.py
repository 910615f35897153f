"""The training loop of `builtin:tiny`, and the rule when to stop.

The text is small and is read many times, so the question is for how many epochs. `train_until_no_better` trains anew
from the start, each time for twice as many epochs, until that no longer lowers the held-out loss or the time is up: a
cosine that has ended beats one that was cut off.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.platform.builtin.corpus import VOCABULARY

BLOCK_TOKENS = 256
FIRST_EPOCHS = 8
EVALUATIONS = 16
PAD_ID, END_ID = 0, 1

logger = logging.getLogger("fedloom.pretrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained: AdamW, linear warm-up, then a cosine down to zero; no dropout.

    With ``bfloat16`` products are taken in that type and weights stay float32: faster where the processor has it.
    """

    device: str
    bfloat16: bool
    batch_blocks: int
    learning_rate: float
    weight_decay: float
    seed: int = 0
    warm_up_share: float = 0.05
    clip_norm: float = 1.0

    @property
    def batch_tokens(self) -> int:
        """Tokens that one step reads."""
        return self.batch_blocks * BLOCK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run left: its best weights, their held-out loss in nats per token, and what it cost."""

    weights: dict[str, Tensor]
    held_out_loss: float
    best_step: int
    steps: int
    seconds: float


def new_model(seed: int) -> LlamaForCausalLM:
    """Make a Llama of about 1.6 million parameters with random weights; no global generator is touched."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_until_no_better(recipe: Recipe, train: Tensor, held_out: Tensor, *, seconds: float) -> Run:
    """Train for 8, 16, 32, ... epochs, each time from the start, within `seconds`; the best run.

    A run that the time does not allow is shortened, unless it would then be hardly longer than the one before.
    """
    started = time.perf_counter()
    steps_per_epoch = math.ceil(len(train) / recipe.batch_tokens)
    train_steps(recipe, train, held_out, steps=2, evaluations=0)  # lazy imports and kernels, which are paid once
    step_s = train_steps(recipe, train, held_out, steps=8, evaluations=0).seconds / 8
    best: Run | None = None
    steps = FIRST_EPOCHS * steps_per_epoch
    while True:
        left_s = seconds - (time.perf_counter() - started)
        affordable = int(0.85 * left_s / step_s)  # the rest is for the evaluations
        if best is not None and affordable < 1.25 * best.steps:
            return best
        run = train_steps(recipe, train, held_out, steps=max(1, min(steps, affordable)), seconds=left_s)
        if best is not None and run.held_out_loss >= best.held_out_loss:
            return best
        best, step_s, steps = run, run.seconds / run.steps, 2 * steps


def train_steps(
    recipe: Recipe,
    train: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    seconds: float = math.inf,
    evaluations: int = EVALUATIONS,
) -> Run:
    """Train a new model for so many steps and keep the weights of the lowest held-out loss.

    If `seconds` run out sooner, the learning rate comes down with the time instead. The held-out loss is taken about
    `evaluations` times; with none of them the run has no weights and only tells the time.
    """
    started = time.perf_counter()
    model = new_model(recipe.seed).to(recipe.device).train()
    optimizer = _optimizer(model, recipe)
    every = math.ceil(steps / evaluations) if evaluations else steps + 1
    best_loss, best_step, weights = math.inf, 0, dict[str, Tensor]()
    for step, batch in enumerate(_batches(recipe, train), start=1):
        time_share = (time.perf_counter() - started) / seconds
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(max((step - 0.5) / steps, time_share), recipe.warm_up_share)
        with _autocast(recipe.device, recipe.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        is_last = step == steps or time_share >= 1
        if evaluations and (step % every == 0 or is_last):
            value = held_out_loss(model, held_out)
            logger.info("step %d of %d: loss %.3f, held-out loss %.4f", step, steps, loss.item(), value)
            if value < best_loss:
                best_loss, best_step = value, step
                weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        if is_last:
            break
    elapsed_s = time.perf_counter() - started
    return Run(weights=weights, held_out_loss=best_loss, best_step=best_step, steps=step, seconds=elapsed_s)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: Tensor) -> float:
    """Mean loss in nats per token over all whole blocks of the held-out stream (of a short stream: over all of it)."""
    width = min(BLOCK_TOKENS, len(held_out))
    blocks = held_out[: len(held_out) // width * width].view(-1, width)  # (blocks, width)
    losses = []
    with _autocast(model.device.type, model.device.type == "cuda"):
        for batch in torch.split(blocks, 64):
            loss = model(input_ids=batch.to(model.device), labels=batch.to(model.device)).loss
            losses.append(loss.float() * len(batch))
    return float(torch.stack(losses).sum() / len(blocks))


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def _schedule(progress: float, warm_up: float) -> float:
    """Return the share of the peak learning rate when `progress` of the run is done: up in a line, down in a cosine."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def _batches(recipe: Recipe, train: Tensor) -> Iterator[Tensor]:
    """Blocks in random order, epoch after epoch; each epoch cuts the stream at other places."""
    generator = torch.Generator().manual_seed(recipe.seed)
    tokens = train.to(recipe.device)
    count = len(tokens) // BLOCK_TOKENS - 1
    pending = torch.empty(0, dtype=torch.int64)
    offsets = torch.arange(BLOCK_TOKENS, device=recipe.device)
    while True:
        while len(pending) < recipe.batch_blocks:
            shift = int(torch.randint(BLOCK_TOKENS, (), generator=generator))
            pending = torch.cat([pending, torch.randperm(count, generator=generator) * BLOCK_TOKENS + shift])
        starts, pending = pending[: recipe.batch_blocks], pending[recipe.batch_blocks :]
        yield tokens[starts.to(recipe.device)[:, None] + offsets]  # (batch_blocks, BLOCK_TOKENS)


def _autocast(device: str, bfloat16: bool) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16)
