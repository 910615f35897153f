"""What must hold for every registered method.

A law is written once, most of them in ``laws.py``; a method that breaks one says so in its traits. A new method meets
these tests by being registered; all that it adds is its closed form of bytes in ``test_laws_bytes.py``.
"""

from pathlib import Path

import pytest
import torch
from laws import BROKEN, HOLDS, LAWS, VARIANTS, federation_of_one, shown
from rounds import (
    CLIENTS,
    HEAD,
    LARGE,
    MIDDLE,
    SHAPES,
    SMALL,
    apart,
    exported,
    frozen_copy,
    leaves,
    play,
    same_bits,
    start,
    take_turn,
    template,
    untouched,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.platform.adapter import Factors
from fedloom.platform.partial import merge
from fedloom.platform.registry import method_class, method_names, option_names


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", method_names())
def test_law(name, law):
    """The law holds to rounding, or the method says in its traits why not, and it truly does not."""
    distance = LAWS[law](name)

    if law in method_class(name).traits.exceptions:
        assert distance > BROKEN
    else:
        assert distance < HOLDS


@pytest.mark.parametrize("name", method_names())
def test_exceptions_are_of_laws_that_exist_and_have_a_reason(name):
    traits = method_class(name).traits

    assert all(law in LAWS and len(reason) > 20 for law, reason in traits.exceptions.items())


@pytest.mark.parametrize(
    ("name", "law", "options", "ratio"),
    [
        ("fedavgm", "federation_of_one", {"beta": 0.0}, None),
        ("fedavgm", "no_op_round", {"beta": 0.0}, None),
        ("zero_padding", "no_op_round", {"padding": "change"}, None),
        ("zero_padding", "federation_of_one", {"padding": "change"}, None),
        ("florist", "federation_of_one", {"tau": 1.0}, None),
        ("florist", "federation_of_one", {"tau": 1.0, "flow": "continue"}, None),
        ("soft", "no_op_round", {"keep_ratio": 1.0}, None),
        ("soft", "no_op_round", {}, 1.0),
        ("soft", "no_op_round", {"aggregation": "keep_old"}, None),
        ("soft", "no_op_round", {"aggregation": "masked_mean"}, None),
        ("flexlora", "no_op_round", {"aggregation": "residual"}, None),
        ("flexlora", "federation_of_one", {"aggregation": "residual"}, None),
        ("flexlora", "split_client", {"aggregation": "residual"}, None),
        ("flexlora", "partial_participation", {"aggregation": "residual"}, None),
        ("fslora", "federation_of_one", {"rest": "frozen"}, None),
        ("fslora", "no_op_round", {"rest": "frozen"}, None),
        ("soft", "no_op_round", {"aggregation": "error_feedback"}, None),
        ("soft", "federation_of_one", {"aggregation": "error_feedback"}, None),
        ("fslora", "no_op_round", {}, 0.5),
        ("fslora", "client_order", {"server_step": "adamw"}, None),
        ("fslora", "partial_participation", {"scope": "model"}, None),
    ],
    ids=shown,
)
def test_law_with_options(name, law, options, ratio):
    """What the defaults trade away comes back with the options that do without the trade."""
    assert LAWS[law](name, options, ratio=ratio) < HOLDS


@pytest.mark.parametrize("name", ["fslora", "soft"])
def test_a_ratio_of_one_makes_a_small_client_a_federation_of_one(name):
    """The ratio wins over the rank: with ratio 1 a client of rank 2 trains and sends everything."""
    assert federation_of_one(name, ratio=1.0, rank=2) < HOLDS
    assert federation_of_one(name, rank=2) > BROKEN


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_merging_is_associative(name, options):
    """Updates may be folded on the way, in any grouping that keeps their order."""
    method, state = start(name, options)
    state, _ = play(method, state)
    _, turns = play(method, state)
    first, second, third = (turn.partial for turn in turns)
    ways = [[first, second, third], [merge([first, second]), third], [first, merge([second, third])]]
    models = [exported(method, method.finish(state, merge(way))) for way in ways]

    assert max(apart(models[0], models[1]), apart(models[0], models[2])) < HOLDS
    assert {merge(way).count for way in ways} == {3}


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_before_training_the_model_is_the_base_model(name, options):
    """B = 0: the first global model changes nothing, nor does the first round of clients that do not train."""
    method, state = start(name, options)
    after, _ = play(method, state, train=untouched)
    expected = template().head

    for stage in (state,) if options.get("server_step") == "adamw" else (state, after):  # AdamW's decay moves the head
        whole = exported(method, stage)
        assert all(whole[module].abs().max() < 1e-14 for module in SHAPES)
        assert all(torch.allclose(whole[f"head.{part}"], expected[part], rtol=1e-14) for part in HEAD)
    assert all(torch.isfinite(leaf).all() for leaf in leaves(after) if isinstance(leaf, Tensor))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_functions_change_none_of_their_arguments(name, options):
    """Every function is pure: what goes in is bit for bit the same afterwards."""
    method, state = start(name, options)
    state, _ = play(method, state)
    before = frozen_copy(state)
    turns = [take_turn(method, state, client) for client in CLIENTS]
    parts = [frozen_copy(turn) for turn in turns]
    for turn, copy in zip(turns, parts, strict=True):
        method.upload(turn.dispatch, turn.trained)
        method.lift(turn.dispatch, turn.payload, 1.0)
        assert same_bits(leaves(turn), copy)
    merged = merge([turn.partial for turn in turns])
    whole = frozen_copy(merged)
    method.export(method.finish(state, merged))
    method.export(state)

    assert same_bits(leaves(merged), whole)
    assert same_bits(leaves(state), before)
    assert all(same_bits(leaves(turn), copy) for turn, copy in zip(turns, parts, strict=True))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_the_same_seeds_give_the_same_bits(name, options):
    """Nothing but the given generators decides a draw; the global one is neither read nor moved."""

    def states():
        method, state = start(name, options)
        for _ in range(3):
            state, _ = play(method, state)
        return leaves(state)

    before = torch.random.get_rng_state()
    first = states()
    with torch.random.fork_rng():
        torch.manual_seed(17)
        second = states()

    assert same_bits(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_a_state_is_tensors_and_json(name, options):
    """A checkpoint is safetensors and JSON: nothing in a state is anything else, and rounds are counted."""
    method, state = start(name, options)
    for number in range(3):
        assert state.round == number
        assert all(leaf is None or isinstance(leaf, (Tensor, str, int, float)) for leaf in leaves(state))
        state, _ = play(method, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_results_keep_the_dtype_of_the_clients(name, options, dtype):
    """float32 stays float32 on the wire and in the state, float64 stays float64."""
    method, state = start(name, options, dtype=dtype)
    for _ in range(2):
        state, turns = play(method, state)
        tensors = [leaf for part in (state, *(turn.payload for turn in turns)) for leaf in leaves(part)]
        assert {leaf.dtype for leaf in tensors if isinstance(leaf, Tensor)} <= {dtype, torch.bool}


class NoDenseTensor(TorchDispatchMode):
    """Fails on any tensor with two dimensions of a module's size."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in leaves(result):
            if isinstance(leaf, Tensor):
                assert sum(size >= 200 for size in leaf.shape) < 2, f"{function} made a tensor of {tuple(leaf.shape)}"
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_no_method_forms_a_weight_matrix(name, options, dtype):
    """With layers far wider than all ranks together, d_out x d_in never exists in a round."""
    method, state = start(name, options, shapes={"up": (300, 200), "down": (200, 300)}, dtype=dtype)
    with NoDenseTensor():
        for _ in range(2):
            state, _ = play(method, state)
        method.export(state)


def test_the_guard_against_weight_matrices_sees_one():
    with NoDenseTensor(), pytest.raises(AssertionError, match="made a tensor of"):
        Factors(B=torch.zeros(300, 2), A=torch.zeros(2, 200)).product()


@pytest.mark.parametrize("name", method_names())
def test_a_method_names_its_paper(name):
    """The catalogue gives the arXiv id, and so does the module's docstring."""
    kind = method_class(name)
    module = __import__(kind.__module__, fromlist=["__doc__"])

    assert kind.traits.paper.startswith("arXiv:")
    assert kind.traits.paper in module.__doc__


@pytest.mark.parametrize("name", [name for name in method_names() if option_names(name)])
def test_options_are_explained_where_users_look(name):
    """Each option stands in the docstring of its class and on the method's page."""
    page = (Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md").read_text()

    assert all(f"        {option}: " in method_class(name).__doc__ for option in option_names(name))
    assert all(f"`{option}`" in page for option in option_names(name))


@pytest.mark.parametrize("name", [name for name in method_names() if not method_class(name).traits.personal])
def test_every_method_learns_from_every_client(name):
    """Whoever is left out changes the result, so each client counts; personal methods have no result in common."""
    method, state = start(name)
    whole, turns = play(method, state)

    for left_out in (SMALL, MIDDLE, LARGE):
        rest = merge([turn.partial for turn in turns if turn.client != left_out])
        assert apart(exported(method, method.finish(state, rest)), exported(method, whole)) > BROKEN
