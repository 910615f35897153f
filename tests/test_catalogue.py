"""The catalogue: one source for the terminal and the pages, and formulas that count what is really sent."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from rounds import HEADS_BYTES, RANK, SHAPES, SMALL, play, start, take_turn
from typer.testing import CliRunner

from fedloom.jobs.catalogue import facts, options, pages
from fedloom.jobs.main import app
from fedloom.platform.errors import FedloomError
from fedloom.platform.registry import method_class, method_names

FOLDER = Path(__file__).parents[1] / "docs" / "methods"


def test_the_pages_say_what_the_classes_say():
    """After ``python -m fedloom.jobs.catalogue docs/methods`` nothing differs: somebody forgot it otherwise."""
    different = [path.name for path, text in pages(FOLDER).items() if path.read_text(encoding="utf-8") != text]

    assert not different


def test_a_page_without_the_comments_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Methods\n")

    with pytest.raises(FedloomError, match=r"README.md needs the lines"):
        pages(tmp_path)


def counted(formula, rank, finished, turn):
    """Evaluate a formula as it is printed: a space between two operands is a product."""
    directions = {"P_B": sum(out for out, _ in SHAPES.values()), "P_A": sum(width for _, width in SHAPES.values())}
    symbols = {
        "r": RANK,
        "r_k": rank,
        "P": sum(directions.values()),
        "P_min": sum(min(shape) for shape in SHAPES.values()),
        **directions,
        "M": len(SHAPES),
        "H": HEADS_BYTES // 4,
        "t": finished,
        "S": sum(len(turn.dispatch.trained.get(m, ())) * shape[finished % 2] for m, shape in SHAPES.items()),
        "ceil": math.ceil,
        "floor": math.floor,
        "max": max,
    }
    words = r"(?!(?:if|else)\b)"
    return eval(re.sub(rf"(?<=[\w)])(?<!\bif)(?<!\belse) (?={words}[\w(])", " * ", formula), {}, symbols)


@pytest.mark.parametrize("name", method_names())
def test_printed_formulas_are_the_bytes_that_are_metered(name):
    method, state = start(name, dtype=torch.float32)
    traits = method_class(name).traits
    for finished in range(2):
        turn = take_turn(method, state, SMALL)
        assert counted(traits.bytes_down, SMALL.rank, finished, turn) == turn.dispatch.payload.num_bytes
        assert counted(traits.bytes_up, SMALL.rank, finished, turn) == turn.payload.num_bytes
        state, _ = play(method, state)


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_all_facts(name):
    """Nothing is left empty, and only a method with a patch says how it grows."""
    traits = method_class(name).traits
    _, state = start(name)

    assert all((traits.exact, traits.down, traits.up, traits.server))
    assert bool(traits.patch) == (state.patch is not None)
    assert all(meaning for _, _, meaning in options(name))


@pytest.mark.parametrize("name", ["ffa", "soft"])
def test_one_method_s_page_has_facts_mathematics_and_options(name):
    done = CliRunner().invoke(app, ["methods", name])
    shown = " ".join(done.output.split())

    assert done.exit_code == 0
    assert all(fact.split(":")[0] in shown for fact in facts(name).values())
    assert " ".join(sys.modules[method_class(name).__module__].__doc__.split())[:40] in shown
    assert all(option in shown and default in shown for option, default, _ in options(name))


def test_the_list_has_paper_ranks_exactness_traffic_and_cost_of_all_in_eighty_characters():
    listed = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "80"}).output
    shown = " ".join(listed.split())

    assert all(len(line) <= 80 for line in listed.splitlines())
    for name in method_names():
        known = facts(name)
        ranks = "unequal ranks" if method_class(name).traits.heterogeneous else "equal ranks"
        assert f"{name}, {known['method']}, {known['paper']}, {ranks} exact mean" in shown
        for word in ("exact mean of the products B A", "down", "up", "server"):
            assert " ".join(known[word].split()) in shown


def test_a_wrong_name_gets_the_nearest():
    wrong = CliRunner().invoke(app, ["methods", "florid"])

    assert wrong.exit_code == 2
    assert "florist" in wrong.output
    assert "Traceback" not in wrong.output
