"""The one interface that a federated method implements, and the values that pass through it.

A method is a page of mathematics: values in, values out, randomness from a generator that it is given.
One round of client c and the server, with the functions of :class:`Method` in capitals::

    dispatch = DISPATCH(state, client, budget)        server    what the client downloads and how it trains
    trained  = local training of ``dispatch``         client    the trainer; no method reaches into it
    payload  = UPLOAD(dispatch, trained)              client    what the client sends back
    partial  = LIFT(dispatch, payload, weight)        anywhere  one update as an element of a monoid
    merged   = merge(partial, partial, ...)           anywhere  sums are added, stacks are put side by side
    state'   = FINISH(state, merged)                  server    the state after the round

Since ``merge`` is associative, updates are folded on the machine where they arise. What a client keeps for itself until
it is asked again is its memory, see :class:`Remembering`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors, Patch, Template, initial_adapter, orthonormal_bases
from fedloom.platform.errors import RoundError
from fedloom.platform.ties import Tie, drawn_ties

SEED_BYTES = 8
FACTORS = (".A", ".B")  # how the names of factors end
ALL_TRAINABLE = frozenset({"A", "B", "head"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One participant as the server may know it: never its data.

    ``memory`` is what it keeps since the last round in which its update was accepted; see :class:`Remembering`.
    """

    id: str
    profile: str
    rank: int  # where its profile's patterns name no other
    num_examples: int
    memory: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a client may spend in this round.

    Attributes:
        rank: the largest LoRA rank that its machine can bear in every module.
        ranks: by module, where it can bear more in some than in others; else empty.
        ratio: the share of the global rank that it may train (FSLoRA) or send (SOFT); ``None`` leaves it to the method.
    """

    rank: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    ratio: float | None = None

    @property
    def largest_rank(self) -> int:
        """The rank of the module in which it can bear the most."""
        return max(self.ranks.values(), default=self.rank)

    def share(self, global_rank: int) -> float:
        """Return the share of the global rank that it allows: its ratio, else its rank over the global one."""
        return min(1.0, self.rank / global_rank) if self.ratio is None else self.ratio


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


def expanded(payload: Payload) -> dict[str, Tensor]:
    """Return the tensors of a payload in full: zeros stand where a mask of entries leaves something out."""
    masks = payload.masks
    return {
        name: tensor.new_zeros(masks[name].shape).masked_scatter(masks[name], tensor) if name in masks else tensor
        for name, tensor in payload.tensors.items()
    }


def received_adapter(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return the adapter that a client starts from, given the (d_out, d_in) of its modules.

    Factors and head that it has in its memory stand where none are sent.
    """
    kept = {
        name: tensor for name, tensor in dispatch.memory.items() if name.startswith("head.") or name[-2:] in FACTORS
    }
    sent, seeds = kept | expanded(dispatch.payload), dispatch.payload.seeds
    if "fresh" not in seeds and "pad" not in seeds:
        return _picked(_between_bases(sent, dispatch, shapes), dispatch.trained)
    template = Template(shapes=shapes, head={}, rank=dispatch.rank, scale=dispatch.scale)
    if "fresh" in seeds:
        drawn = initial_adapter(template, torch.Generator().manual_seed(seeds["fresh"])).cut(dispatch.ranks)
        return Adapter.from_tensors({**drawn.tensors(), **sent}, dispatch.scale)
    received = Adapter.from_tensors(sent, dispatch.scale)
    spare = initial_adapter(template, torch.Generator().manual_seed(seeds["pad"])).cut(dispatch.ranks).factors
    factors = {module: pair.extended(spare[module]) for module, pair in received.factors.items()}
    return Adapter(factors=factors, head=received.head, scale=received.scale)


def ties_of(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tie]:
    """Return the ties between the factors that a client trains, by module; empty where there are none."""
    seed = dispatch.payload.seeds.get("ties")
    return {} if seed is None else drawn_ties(shapes, dispatch.global_rank, seed)


def frozen_factors(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Factors]:
    """Return what a client wears but does not train, by module, as plain factors; empty where there is nothing."""
    if ties := ties_of(dispatch, shapes):
        return {module: tie.opposite() for module, tie in ties.items()}
    if not dispatch.trained:
        return {}
    whole = _between_bases(expanded(dispatch.payload), dispatch, shapes)
    others = {
        module: tuple(sorted(set(range(pair.num_blocks)) - set(dispatch.trained[module])))
        for module, pair in whole.factors.items()
    }
    if not any(others.values()):
        return {}
    return {module: pair.folded() for module, pair in _picked(whole, others).factors.items()}


def _between_bases(sent: Mapping[str, Tensor], dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return the adapter that was sent: cores between the bases that their seed draws, tied factors as plain ones."""
    if ties := ties_of(dispatch, shapes):
        tied = Adapter(factors={m: tie.pair(sent[f"{m}.G"]) for m, tie in ties.items()}, head={}, scale=dispatch.scale)
        return Adapter.from_tensors({**tied.tensors(), **sent}, dispatch.scale)
    seed = dispatch.payload.seeds.get("bases")
    if seed is None:
        return Adapter.from_tensors(sent, dispatch.scale)
    bases = orthonormal_bases(tuple((name, *shape) for name, shape in shapes.items()), dispatch.global_rank, seed)
    drawn = Adapter(factors=bases, head={}, scale=dispatch.scale).tensors()
    return Adapter.from_tensors({**drawn, **sent}, dispatch.scale)


def _picked(adapter: Adapter, wanted: Mapping[str, Sequence[int]]) -> Adapter:
    """Return the adapter with some of its parts alone, of the modules in ``wanted``."""
    factors = {
        module: pair.blocks(wanted[module]) if module in wanted else pair for module, pair in adapter.factors.items()
    }
    return Adapter(factors=factors, head=adapter.head, scale=adapter.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A mergeable part of an aggregation.

    Attributes:
        weight: the sum of the weights of the updates in it.
        count: the number of updates in it.
        sums: weighted sums of tensors by name, but for ``coefficient``.
        coefficient: what the sums are still to be multiplied with: the weight of a single update, which is then added
            in one pass without a weighted copy; 1 once partials are merged.
        stacks: factors by module, B side by side and A (times the update's weight) on top of each other.
        rows: tensors of single updates by name, one update a row.
    """

    weight: float
    count: int
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    coefficient: float = 1.0
    stacks: Mapping[str, Factors] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class Fold:
    """Partials merged from left to right into memory of their own, so that a server's does not grow with the cohort.

    Floating-point sums depend on their order, so callers keep the order of the cohort: first within a chunk, then
    the chunks in theirs.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._stacks: dict[str, list[Factors]] = {}
        self._rows: dict[str, list[Tensor]] = {}

    @property
    def count(self) -> int:
        """The number of updates that were added."""
        return self._count

    def add(self, partial: Partial) -> None:
        """Merge one more partial; its tensors are copied or kept, never changed."""
        if self._count == 0:
            # One call for all tensors: for small adapters the time of a round is that of the calls.
            products = torch._foreach_mul(list(partial.sums.values()), partial.coefficient) if partial.sums else []
            self._sums = dict(zip(partial.sums, products, strict=True))
        elif self._sums:
            terms = [partial.sums[name] for name in self._sums]
            torch._foreach_add_(list(self._sums.values()), terms, alpha=partial.coefficient)
        for module, factors in partial.stacks.items():
            self._stacks.setdefault(module, []).append(factors)
        for name, rows in partial.rows.items():
            self._rows.setdefault(name, []).append(rows)
        self._weight += partial.weight
        self._count += partial.count

    def result(self) -> Partial:
        """Return everything that was added, as one partial.

        Raises:
            RoundError: nothing was added.
        """
        if self._count == 0:
            raise RoundError("nothing to merge: no update arrived")
        stacks = {
            module: Factors(
                B=torch.cat([factors.B for factors in parts], dim=1),
                A=torch.cat([factors.A for factors in parts], dim=0),
            )
            for module, parts in self._stacks.items()
        }
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        return Partial(weight=self._weight, count=self._count, sums=self._sums, stacks=stacks, rows=rows)


def merge(partials: Iterable[Partial]) -> Partial:
    """Merge partials from left to right: sums are added, stacks are put side by side.

    Raises:
        RoundError: there is nothing to merge.
    """
    fold = Fold()
    for partial in partials:
        fold.add(partial)
    return fold.result()


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
        exceptions: laws of ``tests/test_laws.py`` that do not hold, with the reason; a test shows that each is real.
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
