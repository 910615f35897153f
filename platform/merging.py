"""One round over adapters that are already trained: a method's mathematics without its clients.

The method is used as the runtime uses it. What takes the place of training is an adapter that somebody brings, so a
method will do only if its clients send their adapters as they are, and if the result needs nothing of the server's
model before the round. :func:`why_not` finds out by two small rounds, so that no list has to be kept.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from fedloom.platform.adapter import Adapter, Factors, Template, compose, initial_adapter
from fedloom.platform.client import Budget, Client
from fedloom.platform.errors import AdapterError
from fedloom.platform.method import Dispatch, Method, Payload, State
from fedloom.platform.partial import Fold, Partial
from fedloom.platform.seeds import generator_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """An adapter that somebody brings.

    Attributes:
        name: of who brings it.
        num_examples: by which it is weighed.
        ranks: by module; all of them.
        read: gives its values, at the scale of all contributions. It is called once, when its turn has come.
    """

    name: str
    num_examples: int
    ranks: Mapping[str, int]
    read: Callable[[], Adapter]

    @property
    def client(self) -> Client:
        """The client that a method sees."""
        rank = max(self.ranks.values())
        return Client(id=self.name, profile=self.name, rank=rank, num_examples=self.num_examples)

    @property
    def budget(self) -> Budget:
        """What it can bear: the ranks that it has."""
        ranks = set(self.ranks.values())
        return Budget(rank=min(ranks), ranks=self.ranks if len(ranks) > 1 else {})


def _probe_adapter(name: str) -> Adapter:
    drawn = initial_adapter(PROBE, generator_for("probe", "factors", name))
    generator = generator_for("probe", name)
    tensors = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in drawn.tensors().items()}
    return Adapter.from_tensors(tensors, PROBE.scale)


PROBE = Template(shapes={"module": (6, 5)}, head={"head.weight": torch.ones(2)}, rank=4, scale=1.0)
PROBES = tuple(
    Contribution(name=name, num_examples=count, ranks={"module": PROBE.rank}, read=partial(_probe_adapter, name))
    for name, count in (("one", 1), ("other", 2))
)


def merge_round(method: Method, template: Template, contributions: Iterable[Contribution]) -> State:
    """Return the state after a first round to which each contribution is what a client has trained.

    Contributions are read one after the other, and folded. Where the method adds them up, no more than one is in memory
    beside the sum; where it stacks factors, the stack.

    Raises:
        AdapterError: a contribution cannot be read, or its rank is above the template's.
        RoundError: there are none.
    """
    state = method.init(template, generator_for("merge", "init"))
    fold = Fold()
    for contribution in contributions:
        fold.add(_lifted(method, state, contribution))
    return method.finish(state, fold.result())


def _lifted(method: Method, state: State, contribution: Contribution) -> Partial:
    dispatch = _dispatched(method, state, contribution)
    payload = method.upload(dispatch, contribution.read())
    return method.lift(dispatch, payload, float(contribution.num_examples))


def _dispatched(method: Method, state: State, contribution: Contribution) -> Dispatch:
    generator = generator_for("merge", "dispatch", contribution.name)
    return method.dispatch(state, contribution.client, contribution.budget, generator)


def whole_model(method: Method, state: State) -> Adapter:
    """Return the global model as one adapter, a patch included, without directions that add nothing."""
    return trimmed(compose(*method.export(state)))


def handed_out(method: Method, state: State, client: Client, budget: Budget) -> Adapter:
    """Return the model as a client with this budget would be given it: of a higher rank where the method cuts nothing.

    Raises:
        AdapterError: the budget is beyond what the method has.
    """
    if state.patch is not None:
        return whole_model(method, state)  # a patch belongs to the base weights, which nobody has in part
    dispatch = method.dispatch(state, client, budget, generator_for("merge", "hand out", client.id))
    return trimmed(Adapter.from_tensors(dispatch.payload.tensors, dispatch.scale))


def cuts(method: Method) -> bool:
    """Whether a client of a smaller rank is handed a smaller adapter. The method is one that can merge."""
    state, _ = _probed(method, method.init(PROBE, generator_for("probe", "init")))
    client = Client(id="small", profile="small", rank=1, num_examples=1)
    return state.patch is None and max(handed_out(method, state, client, Budget(rank=1)).ranks.values()) == 1


def trimmed(adapter: Adapter) -> Adapter:
    """Return the adapter without the directions of which a factor is zero: its product is the same."""
    factors = {}
    for module, pair in adapter.factors.items():
        live = pair.B.any(dim=0) & pair.A.any(dim=1)
        factors[module] = pair if live.all() else Factors(B=pair.B[:, live], A=pair.A[live])
    return replace(adapter, factors=factors)


def why_not(method: Method) -> str | None:
    """Say why adapters that the method has not sent out cannot be merged by it, or nothing.

    The same two adapters are given to it after two different draws of the state before round 0: whatever differs in the
    result comes from that state.
    """
    drawn = []
    for seed in range(2):
        try:
            state = method.init(PROBE, generator_for("probe", "init", seed))
        except AdapterError as error:
            return f"it does not take every rank: {error}"
        state, reason = _probed(method, state)
        drawn.append(whole_model(method, state).tensors() if reason is None else {})
        # A first round may have nothing to add to what clients send; a second one shows it.
        reason = reason or _probed(method, state)[1]
        if reason is not None:
            return reason
    one, other = drawn
    if one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items()):
        return None
    return "its result depends on the server's model before the round, which is not at hand"


def _probed(method: Method, state: State) -> tuple[State, str | None]:
    """Play a round of two clients on a state of ``PROBE``; say why it cannot be played, if it cannot."""
    fold = Fold()
    for contribution in PROBES:
        adapter = contribution.read()
        dispatch = _dispatched(method, state, contribution)
        payload = method.upload(dispatch, adapter)
        if dispatch.sends == "change":
            return state, "its clients send by how much they changed what they downloaded, which is not at hand"
        if dispatch.trained or not _is_adapter(payload, adapter):
            return state, f"its clients do not send their adapters as they are, but {method.traits.up}"
        fold.add(method.lift(dispatch, payload, float(contribution.num_examples)))
    return method.finish(state, fold.result()), None


def _is_adapter(payload: Payload, adapter: Adapter) -> bool:
    """Whether an upload is a client's adapter, all of it but for directions at its end that were pruned."""
    if payload.masks or payload.seeds or payload.tensors.keys() != adapter.tensors().keys():
        return False
    kept = adapter.cut(Adapter.from_tensors(payload.tensors, adapter.scale).ranks).tensors()
    return all(torch.equal(tensor, kept[name]) for name, tensor in payload.tensors.items())
