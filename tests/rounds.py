"""Rounds without a model: seeded noise stands in for training, in float64 unless a test says otherwise."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors, Patch, Template, compose
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Method, Payload, State
from fedloom.platform.partial import Partial, merge
from fedloom.platform.received import frozen_factors, received_adapter, ties_of
from fedloom.platform.registry import build_method
from fedloom.platform.seeds import generator_for

# Two modules are wider than the stack of all clients (2 + 4 + 8 = 14), one is narrower and takes the dense route.
SHAPES = {"layers.0.q": (18, 30), "layers.0.up": (40, 22), "layers.1.v": (9, 30)}
HEAD = {"score.weight": (3, 18), "score.bias": (3,)}
HEADS_BYTES = 4 * (3 * 18 + 3)  # of the head in float32
SCALE = 1.5
RANK = 8
SMALL = Client(id="small", profile="phone", rank=2, num_examples=10)
MIDDLE = Client(id="middle", profile="laptop", rank=4, num_examples=30)
LARGE = Client(id="large", profile="server", rank=8, num_examples=20)
CLIENTS = (SMALL, MIDDLE, LARGE)

Train = Callable[[Adapter, Dispatch, Client, int], Adapter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One client's part in a round."""

    client: Client
    dispatch: Dispatch
    trained: Adapter
    payload: Payload
    partial: Partial


def template(
    shapes: Mapping[str, tuple[int, int]] = SHAPES, *, rank: int = RANK, dtype: torch.dtype = torch.float64
) -> Template:
    generator = generator_for("head")
    head = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in HEAD.items()}
    return Template(shapes=shapes, head=head, rank=rank, scale=SCALE)


def start(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = RANK,
    dtype: torch.dtype = torch.float64,
) -> tuple[Method, State]:
    """Build a method and its first state, whose tensors are cast to ``dtype``."""
    method = build_method(name, options or {})
    state = method.init(template(shapes, rank=rank, dtype=dtype), generator_for("init"))
    slots = {name: tensor.to(dtype) for name, tensor in state.slots.items()}
    return method, replace(state, adapter=cast_adapter(state.adapter, dtype), slots=slots)


def cast_adapter(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    return Adapter.from_tensors({name: tensor.to(dtype) for name, tensor in adapter.tensors().items()}, adapter.scale)


def noise(received: Adapter, dispatch: Dispatch, client: Client, number: int) -> Adapter:
    """Add seeded noise to what the dispatch lets the client train."""
    generator = generator_for("noise", client.id, number)
    if ties := ties_of(dispatch, {m: (len(pair.B), pair.A.shape[1]) for m, pair in received.factors.items()}):
        received = replace(
            received,
            factors={
                module: tie.pair(G + 0.2 * torch.randn(G.shape, generator=generator, dtype=G.dtype))
                for module, tie in ties.items()
                for G in [tie.untied(received.factors[module].A)]
            },
        )
    trained = {}
    for name, tensor in received.tensors().items():
        kind = "head" if name.startswith("head.") else name[-1]
        draw = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        trained[name] = tensor + 0.2 * draw if kind in dispatch.trainable else tensor
    return Adapter.from_tensors(trained, received.scale)


def untouched(received: Adapter, dispatch: Dispatch, client: Client, number: int) -> Adapter:
    """Return what came, as a client without a single step does."""
    return received


def take_turn(
    method: Method, state: State, client: Client, *, train: Train = noise, budget: Budget | None = None, seed: int = 0
) -> Turn:
    """Dispatch, train, upload and lift one client."""
    dtype = next(iter(state.adapter.head.values())).dtype
    generator = generator_for("dispatch", seed, state.round, client.id)
    dispatch = method.dispatch(state, client, budget or Budget(rank=client.rank), generator)
    dispatch = replace(dispatch, memory=client.memory)  # as the platform does
    shapes = {module: (pair.B.shape[0], pair.A.shape[1]) for module, pair in state.adapter.factors.items()}
    received = cast_adapter(received_adapter(dispatch, shapes), dtype)
    if method.traits.chooses:
        dispatch = method.choose(dispatch, train(received, dispatch, client, state.round))
        received = cast_adapter(received_adapter(dispatch, shapes), dtype)
    trained = train(received, dispatch, client, state.round)
    payload = method.upload(dispatch, trained)
    partial = method.lift(dispatch, payload, float(client.num_examples))
    return Turn(client=client, dispatch=dispatch, trained=trained, payload=payload, partial=partial)


def play(
    method: Method,
    state: State,
    cohort: Iterable[Client] = CLIENTS,
    *,
    train: Train = noise,
    ratio: float | None = None,
    seed: int = 0,
) -> tuple[State, list[Turn]]:
    """Play one round."""
    turns = [
        take_turn(method, state, client, train=train, budget=Budget(rank=client.rank, ratio=ratio), seed=seed)
        for client in cohort
    ]
    return method.finish(state, merge([turn.partial for turn in turns])), turns


def model(adapter: Adapter, patch: Patch | None = None) -> dict[str, Tensor]:
    """Return what a model sees: the whole change of every weight, scale and patch included, and the head."""
    whole = compose(adapter, patch)
    changes = {module: whole.scale * pair.product() for module, pair in whole.factors.items()}
    return changes | {f"head.{name}": tensor for name, tensor in whole.head.items()}


def worn(turn: Turn, patch: Patch | None) -> dict[str, Tensor]:
    """Return the model of a client after its training: what it trained, what it wore beside it, and the patch."""
    shapes = {module: (len(pair.B), pair.A.shape[1]) for module, pair in turn.trained.factors.items()}
    frozen = frozen_factors(turn.dispatch, shapes)
    whole = patch or Patch(scale=turn.trained.scale)
    return model(turn.trained, whole.appended(frozen) if frozen else patch)


def exported(method: Method, state: State) -> dict[str, Tensor]:
    """Return the global model."""
    return model(*method.export(state))


def apart(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the largest relative distance of two tensors with the same name."""
    assert left.keys() == right.keys()
    norms = [(torch.linalg.norm(left[name] - right[name]), torch.linalg.norm(right[name])) for name in left]
    return max(float(distance / norm) if norm > 0 else float(distance) for distance, norm in norms)


def mean_product(turns: Iterable[Turn], module: str) -> Tensor:
    """Return the mean of the clients' products by number of examples, without the scale."""
    total = sum(turn.client.num_examples for turn in turns)
    return sum(turn.client.num_examples / total * turn.trained.factors[module].product() for turn in turns)


def leaves(value: Any) -> list[Any]:
    """Return what a tree of dataclasses, mappings and sequences is made of, in a fixed order."""
    if is_dataclass(value):
        return [leaf for field in fields(value) for leaf in leaves(getattr(value, field.name))]
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    if isinstance(value, (tuple, list, frozenset)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def frozen_copy(value: Any) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(value)]


def same_bits(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(one, other) if isinstance(one, Tensor) else one == other
        for one, other in zip(left, right, strict=True)
    )


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator_for("gaussian", seed, *shape), dtype=torch.float64).to(dtype)


def factors(d_out: int, rank: int, d_in: int, *, seed: int = 0) -> Factors:
    return Factors(B=gaussian(d_out, rank, seed=seed), A=gaussian(rank, d_in, seed=seed + 1))
