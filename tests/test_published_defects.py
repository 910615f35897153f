"""Defects of published code, as laws that our methods keep; the list is ``docs/methods/published-defects.md``.

What is told by one method's own equations stands in that method's tests.
"""

import re
from dataclasses import replace

import pytest
from documents import ROOT, spans
from rounds import (
    CLIENTS,
    LARGE,
    MIDDLE,
    SMALL,
    apart,
    exported,
    mean_product,
    play,
    start,
    take_turn,
    untouched,
    worn,
)
from test_laws import HOLDS, VARIANTS, shown
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.platform.partial import merge
from fedloom.platform.registry import method_class, method_names

PAGE = ROOT / "docs" / "methods" / "published-defects.md"
NUMBERED = {"F": 16, "X": 19, "A": 11, "M": 7}  # as many as the page's sources list of each repository
TRAITS = {name: method_class(name).traits for name in method_names()}
UNEQUAL = [name for name, traits in TRAITS.items() if traits.heterogeneous]
KEEP_ALL = {"florist": {"tau": 1.0}}  # so that it, too, gives a single client's model back
WHOLE = [name for name in UNEQUAL if name in KEEP_ALL or "federation_of_one" not in TRAITS[name].exceptions]
STACKING = ["flora", "florist", "flexlora", "fedhl"]
ODD = 12  # no rank of a published setting
WIDE = {"one": (18, 30), "other": (40, 22)}
# Whose clients start from less than the server has: what the rank holds, and the largest entries.
START_FROM_LESS = [("fedhl", {}), ("flasc", {"density_down": 0.3, "density_up": 0.1})]
STARTS = [variant for variant in VARIANTS if variant not in START_FROM_LESS]


def test_the_page_has_every_defect_and_names_tests_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    named = [span.split("::") for span in spans(PAGE) if span.startswith("test_") and "::" in span]

    assert all(re.search(rf"\b{letter}{i}\b", text) for letter, last in NUMBERED.items() for i in range(1, last + 1))
    assert len(named) > 40
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


@pytest.mark.parametrize(("name", "options"), STARTS, ids=shown)
def test_a_client_of_the_global_rank_starts_from_the_server_s_model(name, options):
    """Published clients find no weights of their rank, or under other names, and silently start anew."""
    method, state = start(name, options, shapes=WIDE, rank=ODD)
    for _ in range(2):
        state, _ = play(method, state, [replace(client, rank=client.rank + 3) for client in CLIENTS])
    turn = take_turn(method, state, replace(LARGE, id="late", rank=ODD), train=untouched)

    assert apart(worn(turn, state.patch), exported(method, state)) < HOLDS


@pytest.mark.parametrize("name", WHOLE)
def test_no_rank_is_built_in(name):
    """Published servers cut at 360, pad to 64, or take what is shorter than 200 for a factor's rank."""
    method, state = start(name, KEEP_ALL.get(name), shapes={"m": (370, 368)}, rank=364)
    after, (turn,) = play(method, state, [replace(LARGE, rank=364)])

    assert apart(exported(method, after), worn(turn, state.patch)) < HOLDS


@pytest.mark.parametrize("name", STACKING)
@pytest.mark.parametrize("ranks", [(2, 2, 4, 8), (4, 4, 8, 2)], ids=str)
def test_a_stack_as_high_as_the_next_client_s_rank_is_not_weighed_again(name, ranks):
    """A published server takes the whole stack for that client's factor, and multiplies it by the client's weight."""
    cohort = [
        replace(client, id=f"c{i}", rank=rank)
        for i, (client, rank) in enumerate(zip((MIDDLE, LARGE, SMALL, LARGE), ranks, strict=True))
    ]
    method, state = start(name, KEEP_ALL.get(name), shapes=WIDE, rank=18)
    after, turns = play(method, state, cohort)

    found = exported(method, after)
    scale = method.export(after)[0].scale
    expected = {module: scale * mean_product(turns, module) for module in WIDE}
    assert apart({module: found[module] for module in WIDE}, expected) < HOLDS


class Decompositions(TorchDispatchMode):
    """Counts what decomposes a matrix."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += any(part in name for part in ("svd", "qr", "eigh"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["fedhl", "fedmomentum", "flexlora", "florist", "raflora"])
def test_a_module_is_decomposed_once_and_not_once_per_client(name):
    """Published servers repeat one dense decomposition for each client; here none is made for a dispatch."""
    counts = []
    for copies in (1, 4):
        method, state = start(name, shapes=WIDE)
        cohort = [replace(client, id=f"{client.id}-{copy}") for copy in range(copies) for client in CLIENTS]
        with Decompositions() as sending:
            turns = [take_turn(method, state, client) for client in cohort]
        with Decompositions() as finishing:
            state = method.finish(state, merge([turn.partial for turn in turns]))
        with Decompositions() as again:
            for client in cohort:
                take_turn(method, state, client)
        assert sending.count == again.count == 0
        counts.append(finishing.count)

    assert 0 < counts[1] <= counts[0]
