"""The one interface that a federated method implements, and the values that pass through it.

A method is a page of mathematics: values in, values out, randomness from a generator that it is given.
One round of client c and the server, with the functions of :class:`Method` in capitals::

    dispatch = DISPATCH(state, client, budget)        server    what the client downloads and how it trains
    trained  = local training of ``dispatch``         client    the trainer; no method reaches into it
    payload  = UPLOAD(dispatch, trained)              client    what the client sends back
    partial  = LIFT(dispatch, payload, weight)        anywhere  one update as an element of a monoid
    merged   = merge(partial, partial, ...)           anywhere  sums are added, stacks are put side by side
    state'   = FINISH(state, merged)                  server    the state after the round

How partials are merged is the same for every method: ``platform/partial.py``. What a client keeps for itself until it
is asked again is its memory, see :class:`Remembering`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.partial import Partial

SEED_BYTES = 8
ALL_TRAINABLE = frozenset({"A", "B", "head"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """A penalty that the trainer adds to the loss: its name in ``platform/penalties.py``, coefficient and options."""

    name: str
    weight: float
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What crosses the network in one direction: the only source of byte counts.

    Attributes:
        tensors: values by flat name (see :meth:`Adapter.tensors`).
        masks: which ranks are present, bool of shape (r,) by module; or, under a tensor's own name, which of its
            entries: bool of its full shape, the tensor then holding those entries alone, in order. One bit each.
        seeds: integers from which the other side redraws what was not sent; eight bytes each.
    """

    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire: values, masks (whole bytes each) and seeds."""
        values = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        bits = sum((mask.numel() + 7) // 8 for mask in self.masks.values())
        return values + bits + SEED_BYTES * len(self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """What the server sends one client, and how the client trains it.

    Attributes:
        payload: what is downloaded and charged. A seed named ``fresh`` asks for a new adapter of rank ``rank`` (A drawn
            from the seed, B = 0) in place of what is neither sent nor in the client's memory; one named ``pad`` asks to
            fill factors of a smaller rank up to ``rank`` with directions of such an adapter. Without it they are
            trained at the ranks that they have. One named ``bases`` draws orthonormal B and A, between which the cores
            that are sent stand; one named ``ties`` ties factors to the matrices that are sent (``platform/ties.py``).
        rank: the rank that the client trains, or the largest where modules differ.
        ranks: the ranks by module where they differ; else empty.
        global_rank: the rank r of the server's adapter, against which masks and sketches are read.
        scale: the scale of the client's adapter while it trains.
        sends: whether payloads come back with what was trained, or with its change since the download.
        trainable: which of ``A``, ``B`` and ``head`` are trained, or of ``C`` (the core), ``gain`` (a factor on each of
            its blocks, 1 at first, which is multiplied into the block after training) and ``head``, or of ``G`` (the
            matrix that ties B to A) and ``head``; the rest is frozen.
        penalty: what the trainer adds to the loss.
        ratio: the share of the ranks that the client may send; 1 unless a budget or a method says less.
        shared: dispatches of one round with the same key carry the same payload, which is then stored once.
        trained: by module, which of the ranks that are sent (of the blocks, where there is a core) are trained,
            ascending, where these are not all. The others are frozen and part of the base model for this round.
        round: the number of finished rounds, where ``upload`` has to know it.
        memory: what the client itself has kept, never charged. The platform puts it there; no method does.
    """

    payload: Payload
    rank: int
    global_rank: int
    scale: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    sends: Literal["values", "change"] = "values"
    trainable: frozenset[str] = ALL_TRAINABLE
    penalty: Penalty | None = None
    ratio: float = 1.0
    shared: str | None = None
    trained: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    round: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the server keeps between rounds: tensors and JSON values, nothing else.

    Attributes:
        round: the number of finished rounds.
        seed: the seed of ``init``, from which initial rows can be redrawn.
        adapter: the global adapter.
        patch: the permanent change of the base weights, for methods that merge into the base.
        slots: further tensors by name, e.g. the moments of a server optimiser.
    """

    round: int
    seed: int
    adapter: Adapter
    patch: Patch | None = None
    slots: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a method is, for the catalogue, the experiment's checks and the law tests.

    Attributes:
        title: the method's usual name.
        paper: the arXiv id.
        heterogeneous: whether clients may have unequal ranks.
        global_rank: whether the server's adapter has the smallest or the largest of the clients' ranks by default.
        ranks_by_module: whether a client may have a rank of its own in every module.
        memory: what a client keeps between rounds, in words; empty for a method that is no :class:`Remembering`.
        personal: whether it is :class:`Personal`: every client has a model of its own, and there is no global one.
        prunes: whether a client may send back fewer directions than it was sent.
        chooses: whether it is :class:`Choosing`: its clients look at a first pass before they say what they train.
        has_ratio: whether a budget's ratio has a meaning for it, so that a controller can steer it.
        aligned: whether every update has every coordinate of the aggregate, so that medians have a meaning.
        additive: what payloads are if the aggregate is a mean of them by which a client's share in it has a bound:
            ``values`` or ``change``, as ``Dispatch.sends``; else ``None``.
        needs_head: whether it trains nothing but a classifier's head.
        changeable: options that may change between two rounds of a run; the state means the same before and after.
        exact: whether the server's model is the mean of the clients' products B A, and if not, what it is instead.
        down: what a client downloads, and ``up``: what it sends, in words.
        bytes_down: the bytes of it, and ``bytes_up``, by the symbols of ``fedloom methods``: r is the server's rank,
            r_k the client's, P, P_B and P_A the numbers in one direction of all modules, of B and of A, P_min those of
            the narrower of the two in each module, M the modules, H the numbers in the head, t the number of finished
            rounds, S the numbers in what a client has chosen. Without pieces of a patch.
        patch: the rank of the piece that a round adds to the patch of every module; empty where there is none.
        server: the operations of a round, with K clients and R the sum of their ranks.
        exceptions: laws of ``tests/laws.py`` that do not hold, with the reason; a test shows that each is real.
    """

    title: str
    paper: str
    heterogeneous: bool
    global_rank: Literal["min", "max"]
    ranks_by_module: bool = False
    memory: str = ""
    personal: bool = False
    prunes: bool = False
    chooses: bool = False
    has_ratio: bool = False
    aligned: bool = False
    additive: Literal["values", "change"] | None = None
    needs_head: bool = False
    changeable: tuple[str, ...] = ()
    exact: str = ""
    down: str = ""
    up: str = ""
    bytes_down: str = ""
    bytes_up: str = ""
    patch: str = ""
    server: str = ""
    exceptions: Mapping[str, str] = field(default_factory=dict)


class Method(Protocol):
    """A federated method: frozen options and six pure functions."""

    traits: ClassVar[Traits]

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Server, once: the state before round 0."""

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Server: what this client downloads and how it trains."""

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Client: what it sends back (sparsified, selected, as a difference, ...)."""

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Anywhere: one update as a partial; ``weight`` is the client's number of examples."""

    def finish(self, state: State, merged: Partial) -> State:
        """Server: the state after the round."""

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Server: the global model, which is evaluated and which users take home."""


class Remembering(Method, Protocol):
    """A method whose clients keep something between rounds; ``traits.memory`` says what.

    It stays with the client: it comes with the dispatch (``client.memory`` on the server's side, ``dispatch.memory`` on
    the client's), is never charged as traffic, and is part of the checkpoint. A client whose update is left out keeps
    what it had. The server may read no more of it than the client's payloads have told.
    """

    def remember(self, dispatch: Dispatch, trained: Adapter) -> Mapping[str, Tensor]:
        """Client: all that it keeps from now on, beside what it sends back."""


class Personal(Remembering, Protocol):
    """A method that gives every client a model of its own. What it exports is the model that a newcomer starts from."""

    def personal(self, state: State, memory: Mapping[str, Tensor]) -> Adapter:
        """The model of a client with this memory, which is empty for one that has never taken part."""


class Choosing(Method, Protocol):
    """A method whose clients choose what they train, once they have seen what a first pass would change.

    The worker makes that pass over the client's examples from the dispatch as it was sent, throws it away, and trains
    what ``choose`` returns. ``upload`` and ``lift`` get that dispatch too.
    """

    def choose(self, dispatch: Dispatch, probed: Adapter) -> Dispatch:
        """Client: the dispatch with ``trained`` named, given the adapter after the first pass."""
