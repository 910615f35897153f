"""Aggregation that trusts nobody: medians in place of means, and noise that hides single clients.

Both stand between a method and the fold, and leave the method as it is. They are sound only for methods that say so in
their traits: a median needs every update to have every coordinate (``aligned``), noise needs the server to take a mean
of changes (``additive``).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.experiment import UpdateSection
from fedloom.platform.method import Choosing, Dispatch, Method, Payload, Personal, Remembering, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.registry import build_method
from fedloom.platform.seeds import generator_for


def method_of(name: str, options: Mapping[str, Any], updates: UpdateSection, seed: int, places: int = 1) -> Method:
    """Build a method, with the aggregation that the experiment's section ``updates`` asks for.

    Args:
        name: of the method.
        options: of the method.
        updates: the section.
        seed: the experiment's, for noise.
        places: how many clients a round samples; the server has to know it where there is noise.
    """
    method = build_method(name, options)
    if updates.rule != "mean":
        method = cast(Method, Robust(method, rule=updates.rule, trim=updates.trim))
    if updates.noise_multiplier is not None and updates.clip_norm is not None:  # the section has no noise without
        deviation = updates.noise_multiplier * updates.clip_norm
        method = cast(Method, Noisy(method, deviation=deviation, seed=seed, places=places))
    return method


class Around:
    """A method, all of whose functions are another's until a subclass says otherwise."""

    def __init__(self, method: Method) -> None:
        self._method = method

    @property
    def traits(self) -> Traits:
        """Those of the method."""
        return self._method.traits

    def init(self, template: Template, generator: torch.Generator) -> State:
        """See :class:`~fedloom.platform.method.Method`."""
        return self._method.init(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """See :class:`~fedloom.platform.method.Method`."""
        return self._method.dispatch(state, client, budget, generator)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """See :class:`~fedloom.platform.method.Method`."""
        return self._method.upload(dispatch, trained)

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """See :class:`~fedloom.platform.method.Method`."""
        return self._method.lift(dispatch, payload, weight)

    def finish(self, state: State, merged: Partial) -> State:
        """See :class:`~fedloom.platform.method.Method`."""
        return self._method.finish(state, merged)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """See :class:`~fedloom.platform.method.Method`."""
        return self._method.export(state)

    def choose(self, dispatch: Dispatch, probed: Adapter) -> Dispatch:
        """See :class:`~fedloom.platform.method.Choosing`."""
        return cast(Choosing, self._method).choose(dispatch, probed)

    def remember(self, dispatch: Dispatch, trained: Adapter) -> Mapping[str, Tensor]:
        """See :class:`~fedloom.platform.method.Remembering`."""
        return cast(Remembering, self._method).remember(dispatch, trained)

    def personal(self, state: State, memory: Mapping[str, Tensor]) -> Adapter:
        """See :class:`~fedloom.platform.method.Personal`."""
        return cast(Personal, self._method).personal(state, memory)


class Robust(Around):
    """Coordinate-wise median or trimmed mean of the updates, in which every client counts the same.

    Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, arXiv:1803.01498. Updates are
    kept apart until the end of the round, so that the server's memory grows with the cohort.
    """

    def __init__(self, method: Method, *, rule: Literal["median", "trimmed_mean"], trim: float) -> None:
        """``trim``: share of the updates that is cut off at each end of every coordinate, rounded up."""
        super().__init__(method)
        self._rule = rule
        self._trim = trim

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Keep one update apart: a row."""
        one = self._method.lift(dispatch, payload, 1.0)
        return Partial(weight=1.0, count=1, rows={name: tensor[None] for name, tensor in one.sums.items()})

    def finish(self, state: State, merged: Partial) -> State:
        """Hand the method the median or trimmed mean as if all clients had sent it."""
        sums = {name: self._middle(rows) for name, rows in merged.rows.items()}
        return self._method.finish(state, Partial(weight=1.0, count=merged.count, sums=sums))

    def _middle(self, rows: Tensor) -> Tensor:
        ordered = rows.sort(dim=0).values
        count = len(ordered)
        most = (count - 1) // 2
        # Rounded up: a share of a small cohort that came to nobody would leave a mean, which protects from nothing.
        cut = most if self._rule == "median" else min(math.ceil(self._trim * count - 1e-9), most)
        return ordered[cut : count - cut].mean(dim=0)


class Noisy(Around):
    """The Gaussian mechanism on the sum of the changes, in which every client counts the same.

    McMahan et al., Learning Differentially Private Recurrent Language Models, arXiv:1710.06963, with its
    fixed denominator: dividing by the number of updates would let a client that joins move the mean by up to twice its
    share. Who is missing counts as a client that changed nothing.

    Updates have been shortened to the clipping norm before. The noise comes from the experiment's seed, so that runs
    repeat: whoever knows the seed can take it off again.
    """

    def __init__(self, method: Method, *, deviation: float, seed: int, places: int) -> None:
        """``deviation``: of the noise on every coordinate of the sum, which is divided by ``places``."""
        super().__init__(method)
        self._deviation = deviation
        self._seed = seed
        self._places = places

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Weigh every client alike."""
        return self._method.lift(dispatch, payload, 1.0)

    def finish(self, state: State, merged: Partial) -> State:
        """Fill the places of those who are missing, and add the noise to the sum."""
        generator = generator_for(self._seed, "round", state.round, "noise")
        # Payloads name factors, or cores, which stand in the slots.
        unchanged = {**state.adapter.tensors(), **state.slots} if self.traits.additive == "values" else {}
        missing = self._places - merged.count
        full = {
            name: total + missing * unchanged[name] if missing and unchanged else total
            for name, total in merged.sums.items()
        }
        noisy = {
            name: total + self._deviation * torch.randn(total.shape, generator=generator, dtype=total.dtype)
            for name, total in full.items()
        }
        return self._method.finish(state, replace(merged, weight=float(self._places), sums=noisy))
