"""Ranks of their own for some modules: dealt out by pattern, trained, charged and timed as such."""

import pytest
import torch
from rounds import CLIENTS, SHAPES, apart, exported, start, take_turn, untouched
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform.client import Budget
from fedloom.platform.errors import AdapterError, ExperimentError
from fedloom.platform.experiment_file import validated
from fedloom.platform.experiment_world import Profile, module_matches
from fedloom.platform.partial import merge
from fedloom.platform.population import budget_of
from fedloom.platform.preparation import assemble, global_rank, trained_ranks
from fedloom.platform.registry import method_class, method_names
from fedloom.platform.world.presets import FEED_FORWARD

ABLE = [name for name in method_names() if method_class(name).traits.ranks_by_module]
FLOWS = [("flexlora", {}), ("florist", {}), ("florist", {"flow": "continue"}), ("florist", {"padding": "zero"})]
TARGETS = ["q_proj", "v_proj", "up_proj"]
PROFILES = [
    {"name": "even", "share": 1, "rank": 2},
    {"name": "uneven", "share": 1, "rank": 2, "rank_pattern": {r"mlp\..+": 6}},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def uneven(client):
    """Give the first module one rank more than the others, as far as the client's rank allows."""
    first, *rest = SHAPES
    return Budget(
        rank=max(1, client.rank - 1), ranks={first: client.rank} | dict.fromkeys(rest, max(1, client.rank - 1))
    )


@pytest.mark.parametrize(("name", "options"), FLOWS)
def test_every_module_is_trained_at_its_own_rank(name, options):
    method, state = start(name, options)
    for _ in range(3):
        turns = [take_turn(method, state, client, budget=uneven(client)) for client in CLIENTS]
        for turn in turns:
            wanted = uneven(turn.client).ranks
            assert all(turn.trained.ranks[module] <= wanted[module] for module in SHAPES)
            if options.get("padding") != "zero" or not options.get("flow"):
                assert turn.trained.ranks == wanted
        state = method.finish(state, merge([turn.partial for turn in turns]))


@pytest.mark.parametrize(("name", "options"), FLOWS)
def test_equal_ranks_by_module_are_one_rank(name, options):
    method, state = start(name, options)
    for _ in range(2):
        one = [take_turn(method, state, client) for client in CLIENTS]
        many = [
            take_turn(method, state, client, budget=Budget(rank=client.rank, ranks=dict.fromkeys(SHAPES, client.rank)))
            for client in CLIENTS
        ]
        states = [method.finish(state, merge([turn.partial for turn in turns])) for turns in (one, many)]
        assert apart(exported(method, states[0]), exported(method, states[1])) == 0
        state = states[0]


def test_the_mean_of_unequal_products_is_exact_module_by_module():
    """With tau = 1 the global change is the weighted mean of what the clients hold."""
    method, state = start("florist", {"tau": 1.0})
    turns = [take_turn(method, state, client, budget=uneven(client)) for client in CLIENTS]
    total = sum(client.num_examples for client in CLIENTS)
    after = exported(method, method.finish(state, merge([turn.partial for turn in turns])))
    for module in SHAPES:
        terms = [turn.client.num_examples / total * turn.trained.factors[module].product() for turn in turns]
        expected = state.adapter.scale * torch.stack(terms).sum(dim=0)
        torch.testing.assert_close(after[module], expected, rtol=1e-10, atol=1e-10)


def test_nobody_is_sent_more_than_the_global_adapter_has():
    method, state = start("flexlora")
    largest = max(state.adapter.ranks.values())
    ranks = dict.fromkeys(SHAPES, 1) | {next(iter(SHAPES)): largest + 1}
    with pytest.raises(AdapterError, match=f"has rank {largest + 1}"):
        take_turn(method, state, CLIENTS[0], train=untouched, budget=Budget(rank=1, ranks=ranks))


@pytest.mark.parametrize(
    ("module", "feed_forward"),
    [
        ("model.layers.0.mlp.gate_proj", True),
        ("model.layers.0.self_attn.q_proj", False),
        ("roberta.encoder.layer.3.intermediate.dense", True),
        ("roberta.encoder.layer.3.output.dense", True),
        ("roberta.encoder.layer.3.attention.output.dense", False),
        ("distilbert.transformer.layer.1.ffn.lin1", True),
        ("distilbert.transformer.layer.1.attention.out_lin", False),
        ("model.decoder.layers.0.fc1", True),
        ("transformer.h.0.attn.c_attn", False),
    ],
)
def test_flexlora_s_populations_know_feed_forward_modules_by_their_names(module, feed_forward):
    assert module_matches(FEED_FORWARD, module) is feed_forward


def test_a_pattern_matches_a_whole_name_or_its_end_after_a_dot():
    profile = Profile.model_validate({"name": "p", "share": 1, "rank_pattern": {"up": 3, "b.up": 5, "a": 7}})
    ranks = profile.ranks_in(["up", "x.up", "x.b.up", "xup", "a.x"], 1)
    assert ranks == {"up": 3, "x.up": 3, "x.b.up": 3, "xup": 1, "a.x": 1}


def test_a_method_with_one_rank_takes_what_every_module_bears(llama):
    profiles = [{"name": "p", "share": 1, "rank": 4, "rank_pattern": {r"mlp\..+": 2, "v_proj": 6}}]
    for name in method_names():
        if name == "head_only":
            continue
        method = {"name": name} | ({"heads": 2} if name == "ravan" else {})  # whose rank is a multiple of its heads
        experiment = make_experiment(
            llama, adapter={"targets": TARGETS}, population={"profiles": profiles}, method=method
        )
        prepared = assemble(experiment, make_data())
        budget = budget_of(experiment.population.profiles[0], 4, prepared.shapes)
        assert (budget.rank, budget.largest_rank) == (2, 6)
        assert global_rank(experiment, prepared) == (6 if name in ABLE else 2), name
        mean = trained_ranks(experiment, prepared)["p"]
        assert (2 < mean < 6) if name in ABLE else mean == 2, name


@pytest.mark.parametrize("name", [name for name in ABLE if name != "local_only"])  # which sends nothing
def test_bytes_and_operations_are_those_of_the_modules_ranks(llama, name):
    experiment = make_experiment(
        llama,
        adapter={"targets": TARGETS},
        population={"profiles": [profile | {"compute_gflop_per_s": 1} for profile in PROFILES]},
        cohort={"size": 6},
        method={"name": name},
    )
    shapes = assemble(experiment, make_data()).shapes
    sizes = {module: d_out + d_in for module, (d_out, d_in) in shapes.items()}
    head = 3 * 16
    per_client = {
        "even": 2 * sum(sizes.values()),
        "uneven": sum((6 if ".mlp." in module else 2) * size for module, size in sizes.items()),
    }

    rounds, _ = finished(experiment)

    assert {record.profile for record in rounds[1].records} == {"even", "uneven"}
    for done in rounds[1:]:
        for record in done.records:
            assert record.bytes_up == 4 * (per_client[record.profile] + head)
            assert record.rank == pytest.approx(per_client[record.profile] / sum(sizes.values()))


def test_a_pattern_that_matches_no_target_is_refused(llama):
    experiment = make_experiment(llama, population={"profiles": PROFILES}, method={"name": "flexlora"})
    with pytest.raises(ExperimentError, match=r"rank_pattern .* of profile 'uneven' matches none .*\(q_proj, v_proj\)"):
        global_rank(experiment, assemble(experiment, make_data()))


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(ExperimentError, match=r"rank_pattern: '\(' is not a regular expression"):
        validated(
            {"population": {"profiles": [{"name": "p", "share": 1, "rank_pattern": {"(": 3}}]}}, place="experiment.yaml"
        )


def test_flexlora_s_third_type_has_two_ranks():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    experiment = validated({"population": {"preset": "flexlora-uniform"}, "adapter": {"targets": targets}}, place="x")
    third = {profile.name: profile for profile in experiment.population.profiles}["type-3"]
    ranks = third.ranks_in(["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"], 30)
    assert list(ranks.values()) == [30, 200]
