"""The laws of federated methods, as distances from what each asks for, and the options to try."""

from dataclasses import replace

from rounds import (
    CLIENTS,
    LARGE,
    MIDDLE,
    RANK,
    apart,
    exported,
    play,
    start,
    take_turn,
    untouched,
    worn,
)

from fedloom.platform.partial import merge
from fedloom.platform.registry import method_names

HOLDS, BROKEN = 1e-9, 1e-3  # relative distances: float64's rounding, and what nobody would call rounding


def federation_of_one(name, options=None, *, ratio=None, rank=RANK):
    """One client at the global rank: the global model is the client's own, in round 0 and later."""
    method, state = start(name, options)
    worst = 0.0
    for _ in range(3):
        after, (turn,) = play(method, state, [replace(LARGE, rank=rank)], ratio=ratio)
        worst = max(worst, apart(exported(method, after), worn(turn, state.patch)))
        state = after
    return worst


def client_order(name, options=None, *, ratio=None):
    """In whatever order updates arrive, the global model is the same."""
    method, state = start(name, options)
    state, _ = play(method, state, ratio=ratio)
    after, turns = play(method, state, ratio=ratio)
    other = method.finish(state, merge([turns[index].partial for index in (2, 0, 1)]))
    return apart(exported(method, other), exported(method, after))


def split_client(name, options=None, *, ratio=None):
    """Two halves of a client, with equal tensors and half the examples each, count as the whole."""
    method, state = start(name, options)
    state, _ = play(method, state, ratio=ratio)
    after, turns = play(method, state, ratio=ratio)
    halves = [method.lift(turns[1].dispatch, turns[1].payload, MIDDLE.num_examples / 2)] * 2
    other = method.finish(state, merge([turns[0].partial, *halves, turns[2].partial]))
    return apart(exported(method, other), exported(method, after))


def no_op_round(name, options=None, *, ratio=None):
    """Clients that return what they got do not change the global model."""
    method, state = start(name, options)
    state, _ = play(method, state, ratio=ratio)
    after, _ = play(method, state, train=untouched, ratio=ratio)
    return apart(exported(method, after), exported(method, state))


def partial_participation(name, options=None, *, ratio=None):
    """Weights count relative to those who are there: who agrees keeps what it agrees on, whoever is missing."""
    method, state = start(name, options)
    state, _ = play(method, state, ratio=ratio)
    everyone = [replace(client, rank=RANK) for client in CLIENTS]
    agreed = take_turn(method, state, LARGE).trained

    def after(cohort):
        return exported(method, play(method, state, cohort, train=lambda *_: agreed)[0])

    whole = after(everyone)
    richer = [replace(client, num_examples=7 * client.num_examples) for client in CLIENTS]
    scaled = exported(method, play(method, state, richer)[0])
    return max(
        apart(after(everyone[:1]), whole),
        apart(after(everyone[1:]), whole),
        apart(scaled, exported(method, play(method, state)[0])),
    )


LAWS = {
    law.__name__: law for law in (federation_of_one, client_order, split_client, no_op_round, partial_participation)
}
DEFAULTS = [(name, {}) for name in method_names()]
VARIANTS = [
    *DEFAULTS,
    ("fslora", {"server_step": "adamw"}),
    ("fslora", {"scope": "model"}),
    ("flasc", {"density_down": 0.3, "density_up": 0.1}),
    ("fedopt", {"optimizer": "yogi"}),
    ("fedopt", {"optimizer": "adagrad"}),
    ("fedopt", {"optimizer": "adamw"}),
    ("fedex", {"residual_rank": 2}),
    ("zero_padding", {"padding": "change"}),
    ("ravan", {"choice": "weight"}),
    ("flexlora", {"aggregation": "residual"}),
    ("fslora", {"rest": "frozen"}),
    ("florist", {"max_rank": 3}),
    ("soft", {"aggregation": "error_feedback"}),
    ("florist", {"flow": "continue"}),
    ("florist", {"flow": "continue", "padding": "zero"}),
    ("soft", {"aggregation": "keep_old"}),
    ("soft", {"aggregation": "masked_mean"}),
]


def shown(value):
    return "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else str(value)
