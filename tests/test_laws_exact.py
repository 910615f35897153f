"""Laws of what is claimed: exactness, indifference to a client's gauge, states that survive a disk, refusals."""

import json
import math
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from laws import HOLDS, LAWS, VARIANTS, shown
from rounds import (
    CLIENTS,
    LARGE,
    RANK,
    SCALE,
    SHAPES,
    apart,
    exported,
    gaussian,
    leaves,
    noise,
    play,
    same_bits,
    start,
    take_turn,
    template,
    worn,
)

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.experiment import Experiment
from fedloom.platform.registry import method_class, method_names
from fedloom.platform.server import Server, Snapshot
from fedloom.platform.updates import refusal
from fedloom.platform.wire import pack, unpack

EXACT = [name for name in method_names() if method_class(name).traits.exact.startswith("yes:")]
ALONE = [name for name in method_names() if "federation_of_one" not in method_class(name).traits.exceptions]
ALIKE = {"square": (RANK, RANK), "tall": (20, RANK), "wide": (RANK, 20)}  # d_out, d_in and r are equal in turn
# Methods whose server sees products.
PRODUCTS = [
    ("flexlora", {}),
    ("flexlora", {"aggregation": "residual"}),
    ("florist", {}),
    ("florist", {"flow": "continue"}),
    ("flora", {}),
    ("fedex", {}),
    ("fedmomentum", {}),
    ("fedhl", {}),
]


@pytest.mark.parametrize("shapes", [SHAPES, ALIKE], ids=["unlike", "alike"])
@pytest.mark.parametrize("name", [*EXACT, "florist"])
def test_who_claims_to_be_exact_exports_the_mean_of_the_clients_models(name, shapes):
    """Weighted by examples, patch and frozen parts included, in three rounds of clients that train all ranks."""
    method, state = start(name, {"tau": 1.0} if name == "florist" else {}, shapes=shapes)
    everyone = [replace(client, rank=RANK) for client in CLIENTS]
    for _ in range(3):
        after, turns = play(method, state, everyone)
        models = [worn(turn, state.patch) for turn in turns]
        mean = {
            key: sum(c.num_examples / 60 * one[key] for c, one in zip(CLIENTS, models, strict=True))
            for key in models[0]
        }
        assert apart(exported(method, after), mean) < HOLDS
        state = after


def in_another_gauge(received, dispatch, client, number):
    """The trained adapter of ``noise`` with (B Q, Q^T A) for (B, A): the same products."""
    trained = noise(received, dispatch, client, number)
    factors = {}
    for seed, (module, pair) in enumerate(trained.factors.items()):
        Q = torch.linalg.qr(gaussian(pair.rank, pair.rank, seed=seed + client.num_examples)).Q
        factors[module] = Factors(B=pair.B @ Q, A=Q.T @ pair.A)
    return Adapter(factors=factors, head=trained.head, scale=trained.scale)


@pytest.mark.parametrize(("name", "options"), PRODUCTS, ids=shown)
def test_product_space_methods_do_not_see_a_client_s_gauge(name, options):
    """Whatever rotation each client has turned its factors by, the global model is the same."""
    method, state = start(name, options)
    state, _ = play(method, state)
    turned, _ = play(method, state, train=in_another_gauge)
    plain, _ = play(method, state)

    assert apart(exported(method, turned), exported(method, plain)) < HOLDS


def through_files(snapshot):
    """Write and read a snapshot as a checkpoint does."""

    def read(packet):
        written = {name: tensor.contiguous() for name, tensor in unpack(packet).items()}
        return pack(safetensors.torch.load(safetensors.torch.save(written)), json.loads(json.dumps(packet.meta)))

    return Snapshot(state=read(snapshot.state), pieces=tuple(map(read, snapshot.pieces)))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_a_state_survives_files_bit_for_bit(name, options):
    """Through safetensors and JSON into a new server: the same state, in its order, and the same next round."""
    method, state = start(name, options, dtype=torch.float32)
    for _ in range(2):
        state, _ = play(method, state)
    experiment = Experiment.model_validate({"method": {"name": name, **options}})
    old, new = Server(threads=torch.get_num_threads()), Server(threads=torch.get_num_threads())
    for server in (old, new):
        server.begin(experiment, SHAPES, RANK, pack(dict(template(dtype=torch.float32).head)), "run")
    old._state = state
    new.restore(through_files(old.snapshot()))

    states = (new._state, state)
    assert same_bits(*(leaves(each.adapter) + leaves(each.slots) for each in states))
    following = [exported(method, play(method, each)[0]) for each in states]  # with all that the patch holds
    assert same_bits(*(leaves(whole) for whole in following))


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"local_only"}))  # whose clients send nothing
def test_one_number_that_is_not_finite_keeps_an_update_out(name):
    """In any tensor of any method's update: it is refused before it is merged."""
    method, state = start(name, dtype=torch.float32)
    turn = take_turn(method, state, LARGE)
    expected = turn.payload

    assert refusal(expected, expected, 0.0) is None
    for key, tensor in expected.tensors.items():
        for wrong in (math.nan, math.inf):
            spoilt = tensor.clone()
            spoilt.view(-1)[-1] = wrong
            found = refusal(replace(expected, tensors={**expected.tensors, key: spoilt}), expected, 0.0)
            assert (found.kind, found.reason) == ("not_finite", f"tensor {key!r} is not finite")


@pytest.mark.parametrize("name", [n for n in method_names() if "no_op_round" in method_class(n).traits.exceptions])
def test_who_changes_without_training_says_by_how_much(name):
    """The percentage in the catalogue is what the law measures: the largest relative change of a module or the head."""
    said = re.search(r"(\d+) %", method_class(name).traits.exceptions["no_op_round"])

    assert said
    assert int(said[1]) == round(100 * LAWS["no_op_round"](name))


@pytest.mark.parametrize("name", ALONE)
def test_factors_are_told_apart_by_name_where_shapes_are_alike(name):
    """A published server takes for A what has r rows."""
    method, state = start(name, shapes=ALIKE)
    for _ in range(2):
        after, (turn,) = play(method, state, [LARGE])
        assert apart(exported(method, after), worn(turn, state.patch)) < HOLDS
        state = after


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=shown)
def test_there_is_one_scale_whatever_the_rank(name, options):
    """Published baselines merge at other scales than clients trained at; a sketch alone has r / k in its own."""
    method, state = start(name, options)
    for _ in range(2):
        turns = [take_turn(method, state, client) for client in CLIENTS]
        sketched = name == "fslora" and options.get("rest") != "frozen"
        expected = {SCALE * RANK / client.rank if sketched else SCALE for client in CLIENTS}
        assert {turn.dispatch.scale for turn in turns} == expected
        adapter, patch = method.export(state)
        assert {adapter.scale, SCALE if patch is None else patch.scale} == {SCALE}
        state, _ = play(method, state)
