"""Bytes on the wire: what is metered is the closed form, for every method, and equal keys mean equal payloads."""

import math
from dataclasses import replace

import pytest
import torch
from laws import VARIANTS, shown
from rounds import (
    CLIENTS,
    HEADS_BYTES,
    RANK,
    SHAPES,
    leaves,
    play,
    same_bits,
    start,
    take_turn,
)

from fedloom.platform.registry import method_names

ROW = sum(d_out + d_in for d_out, d_in in SHAPES.values())  # numbers in one direction of all modules
OUT = sum(d_out for d_out, _ in SHAPES.values())  # of them, those of B
NARROW = sum(min(shape) for shape in SHAPES.values())  # numbers in the narrower side of all modules
MODULES = len(SHAPES)


def sparse_bytes(density, entries):
    """Count the entries that are sent, and a bit for each of all; only the head's tensors leave bits of a byte over."""
    return 4 * entries if density == 1 else 4 * int(density * entries) + math.ceil(entries / 8)


# Bytes down and up of a client of rank k in float32, the global rank being r.
BYTES = {
    "fedavgm": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * r * ROW + HEADS_BYTES),
    "fedopt": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * r * ROW + HEADS_BYTES),
    "fedex": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * r * ROW + HEADS_BYTES),  # likewise
    "flasc": lambda k, r: (4 * r * ROW + HEADS_BYTES, sparse_bytes(k / r, r * ROW + HEADS_BYTES // 4)),
    "hetlora": lambda k, r: (4 * k * ROW + HEADS_BYTES, 4 * k * ROW + HEADS_BYTES),
    "flora": lambda k, r: (HEADS_BYTES + 8, 4 * k * ROW + HEADS_BYTES),  # likewise
    "zero_padding": lambda k, r: (4 * k * ROW + HEADS_BYTES, 4 * k * ROW + HEADS_BYTES),
    "ffa": lambda k, r: (4 * r * OUT + HEADS_BYTES + 8, 4 * r * OUT + HEADS_BYTES),
    "fedit": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * r * ROW + HEADS_BYTES),
    "flexlora": lambda k, r: (4 * k * ROW + HEADS_BYTES, 4 * k * ROW + HEADS_BYTES),
    "florist": lambda k, r: (HEADS_BYTES + 8, 4 * k * ROW + HEADS_BYTES),  # the patch is charged by the platform
    "fslora": lambda k, r: (4 * k * ROW + HEADS_BYTES + 8, 4 * k * ROW + HEADS_BYTES),
    "per_index": lambda k, r: (4 * k * ROW + HEADS_BYTES, 4 * k * ROW + HEADS_BYTES),
    "raflora": lambda k, r: (4 * k * ROW + HEADS_BYTES, 4 * k * ROW + HEADS_BYTES),
    "lora_fair": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * r * ROW + HEADS_BYTES),
    "fedmomentum": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * r * ROW + HEADS_BYTES),
    "fedrot": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * r * ROW + HEADS_BYTES),
    "local_only": lambda k, r: (HEADS_BYTES + 8, 0),  # of a newcomer, as is the next
    "fedsa": lambda k, r: (4 * r * (ROW - OUT) + HEADS_BYTES + 8, 4 * r * (ROW - OUT)),
    "fed_plora": lambda k, r: (4 * r * ROW + HEADS_BYTES + 8, 4 * k * ROW + HEADS_BYTES),
    "fed_sb": lambda k, r: (4 * MODULES * r * r + HEADS_BYTES + 8, 4 * MODULES * r * r + HEADS_BYTES),
    "ravan": lambda k, r: (MODULES * r * r + HEADS_BYTES + 16, MODULES * k * r + HEADS_BYTES),  # 4 heads of r / 4
    "florg": lambda k, r: (4 * r * NARROW + HEADS_BYTES + 8, 4 * r * NARROW + HEADS_BYTES),
    "fedhl": lambda k, r: (4 * k * ROW + HEADS_BYTES, 4 * k * ROW + HEADS_BYTES),
    "head_only": lambda k, r: (HEADS_BYTES + 8, HEADS_BYTES),
    "soft": lambda k, r: (4 * r * ROW + HEADS_BYTES, 4 * k * ROW + HEADS_BYTES + MODULES * math.ceil(r / 8)),
}


def chosen_numbers(chosen, t):
    """Count the numbers of B, or in every second round of A, at the ranks that a client has chosen."""
    return sum(len(chosen[module]) * shape[t % 2] for module, shape in SHAPES.items())


# Where rounds differ, t is the number of finished ones; where clients choose, chosen are their ranks by module.
BYTES_BY_ROUND = {
    "lora_a2": lambda k, r, t, chosen: (
        4 * r * ROW + HEADS_BYTES,
        4 * chosen_numbers(chosen, t) + HEADS_BYTES + MODULES * math.ceil(r / 8),
    ),
    "rolora": lambda k, r, t, _: (4 * r * ROW + HEADS_BYTES, 4 * r * (OUT, ROW - OUT)[t % 2] + HEADS_BYTES),
}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"rank{client.rank}")
@pytest.mark.parametrize("name", method_names())
def test_metered_bytes_are_the_closed_form(name, client):
    """The payload's own count is what shapes and ranks say, in every round."""
    method, state = start(name, dtype=torch.float32)
    for _ in range(2):
        turn = take_turn(method, state, client)
        sizes = (client.rank, RANK)
        special = (*sizes, state.round, turn.dispatch.trained)
        expected = BYTES_BY_ROUND[name](*special) if name in BYTES_BY_ROUND else BYTES[name](*sizes)
        assert (turn.dispatch.payload.num_bytes, turn.payload.num_bytes) == expected
        state, _ = play(method, state)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_payloads_with_the_same_key_are_the_same(name, options):
    """Dispatches that share a key may share one stored payload; those of different ranks may not share a key."""
    method, state = start(name, options)
    for _ in range(2):
        twins = [take_turn(method, state, replace(client, id=f"{client.id}-2")) for client in CLIENTS]
        turns = [take_turn(method, state, client) for client in CLIENTS]
        pairs = [(one, other) for one in turns for other in turns + twins if one.dispatch.shared is not None]
        for one, other in pairs:
            if one.dispatch.shared == other.dispatch.shared:
                assert same_bits(leaves(one.dispatch.payload), leaves(other.dispatch.payload))
        state, _ = play(method, state)
