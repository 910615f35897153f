"""What clients send is checked before it is merged; what is wrong leaves no trace and has a name."""

import dataclasses
import math

import pytest
import torch
from opacus.accountants import RDPAccountant
from small import KINDS, finished, make_data, make_experiment, save_llama

from fedloom.platform import worker as worker_module
from fedloom.platform.adapter import Template
from fedloom.platform.aggregation import Noisy, Robust
from fedloom.platform.client import Budget, Client
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.method import Payload
from fedloom.platform.partial import Fold, Partial
from fedloom.platform.preparation import assemble, global_rank
from fedloom.platform.privacy import epsilon_after
from fedloom.platform.registry import build_method, method_class, method_names
from fedloom.platform.server import Server
from fedloom.platform.updates import norm_of
from fedloom.platform.wire import pack, pack_partial, unpack_partial

DATA = make_data()
ADDITIVE = [name for name in method_names() if method_class(name).traits.additive]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def first(payload):
    return next(iter(payload.tensors))


def spoilt(change):
    """Return a way to spoil a payload: ``change(name, tensor)`` of its first tensor."""

    def spoil(payload):
        name = first(payload)
        return dataclasses.replace(payload, tensors={**payload.tensors, name: change(payload.tensors[name])})

    return spoil


def without_first(payload):
    kept = {name: tensor for name, tensor in payload.tensors.items() if name != first(payload)}
    return dataclasses.replace(payload, tensors=kept)


def renamed(payload):
    tensors = {f"{name}x" if name == first(payload) else name: tensor for name, tensor in payload.tensors.items()}
    return dataclasses.replace(payload, tensors=tensors)


def everywhere(value):
    """Return a way to spoil a payload: the same value in all of its tensors."""

    def spoil(payload):
        tensors = {name: torch.full_like(tensor, value) for name, tensor in payload.tensors.items()}
        return dataclasses.replace(payload, tensors=tensors)

    return spoil


BAD = {
    "nan": ("not_finite", spoilt(lambda tensor: tensor.index_fill(0, torch.tensor([0]), math.nan))),
    "infinite": ("not_finite", spoilt(lambda tensor: tensor.index_fill(0, torch.tensor([0]), math.inf))),
    "transposed": ("shape", spoilt(lambda tensor: tensor.T.contiguous())),
    "cut": ("shape", spoilt(lambda tensor: tensor[:-1])),
    "half": ("dtype", spoilt(lambda tensor: tensor.half())),
    "integer": ("dtype", spoilt(lambda tensor: tensor.int())),
    "missing": ("module", without_first),
    "stranger": ("module", renamed),
    "oversized": ("size", spoilt(lambda tensor: torch.cat([tensor, tensor]))),
    "doubled precision": ("size", spoilt(lambda tensor: tensor.double())),
    "absurd": ("norm", spoilt(lambda tensor: tensor + 1e5)),
    "about to overflow": ("norm", everywhere(1e18)),
    "as large as can be": ("norm", everywhere(3e38)),
}


class Spoiling:
    """A method of which one client sends something else."""

    def __init__(self, method, victim, spoil):
        self._method, self._victim, self._spoil = method, victim, spoil
        self.client = None

    def __getattr__(self, name):
        return getattr(self._method, name)

    def upload(self, dispatch, trained):
        payload = self._method.upload(dispatch, trained)
        asked, self.client = self.client, None  # the second call of a client is the platform's own
        return self._spoil(payload) if asked == self._victim else payload


def play_with(monkeypatch, experiment, victim, spoil):
    """Run with one client that sends something else in every round."""
    held = {}
    method_of, train_client = worker_module.method_of, worker_module.train_client

    def spoiling(*arguments):
        held["method"] = Spoiling(method_of(*arguments), victim, spoil)
        return held["method"]

    def trained(*arguments, **settings):
        held["method"].client = settings["client"]
        return train_client(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(worker_module, "method_of", spoiling)
        patched.setattr(worker_module, "train_client", trained)
        return finished(experiment)


def play_without(monkeypatch, experiment, victim):
    """Run with one client whose training fails."""
    train_client = worker_module.train_client

    def failing(*arguments, **settings):
        trained = train_client(*arguments, **settings)
        return dataclasses.replace(trained, loss=math.nan) if settings["client"] == victim else trained

    with monkeypatch.context() as patched:
        patched.setattr(worker_module, "train_client", failing)
        return finished(experiment)


@pytest.mark.parametrize("name", KINDS)
def test_a_round_with_a_bad_update_is_one_without_its_client(llama, monkeypatch, name):
    """Every kind of badness, every kind of message: the bits as if its client never trained; both named."""
    experiment = make_experiment(llama, rounds=2, method={"name": name}, updates={"max_norm": 1e4}, cohort={"size": 6})
    expected, adapter = play_without(monkeypatch, experiment, "c2")
    for what, (kind, spoil) in BAD.items():
        rounds, found = play_with(monkeypatch, experiment, "c2", spoil)
        for done, without in zip(rounds[1:], expected[1:], strict=True):
            (refused,) = [record for record in done.records if record.refused]
            assert (refused.client, refused.fault) == ("c2", kind), what
            assert done.metrics[f"refused/{kind}"] == 1
            assert done.metrics["eval/loss"] == without.metrics["eval/loss"]
        assert all(torch.equal(tensor, found.tensors()[key]) for key, tensor in adapter.tensors().items()), what


@pytest.mark.parametrize("name", KINDS)
def test_no_finite_update_makes_the_state_infinite_even_without_a_bound_on_changes(llama, monkeypatch, name):
    for value in (1e5, 1e9, 1e18, 3e38):
        experiment = make_experiment(llama, rounds=1, method={"name": name}, cohort={"size": 6})
        rounds, adapter = play_with(monkeypatch, experiment, "c2", everywhere(value))
        assert all(torch.isfinite(tensor).all() for tensor in adapter.tensors().values()), value
        assert math.isfinite(rounds[1].metrics["eval/loss"]), value


def test_what_came_too_late_is_not_looked_into(llama, monkeypatch):
    """The deadline stands before every other reason: the server waits until then and counts a straggler."""
    profile = {"name": "slow", "share": 1, "rank": 2, "compute_gflop_per_s": 1.0}
    experiment = make_experiment(
        llama,
        rounds=1,
        population={"profiles": [{**profile, "uplink_mbit_per_s": 0.5}]},
        network={"kind": "links"},
        cohort={"size": 6, "deadline_s": 60.0},
    )
    expected, _ = finished(experiment)
    (sent,) = {record.bytes_up for record in expected[1].records}
    slowest = max(record.latency_s for record in expected[1].records)
    tight = experiment.model_copy(update={"cohort": experiment.cohort.model_copy(update={"deadline_s": slowest * 1.5})})

    def huge(payload):
        name = first(payload)
        return dataclasses.replace(payload, tensors={**payload.tensors, name: torch.zeros(sent)})

    rounds, _ = play_with(monkeypatch, tight, "c2", huge)
    (refused,) = [record for record in rounds[1].records if record.refused]
    assert (refused.client, refused.fault) == ("c2", "late")
    assert rounds[1].metrics["stragglers"] == 1
    assert rounds[1].metrics["sim/round_s"] == pytest.approx(slowest * 1.5)


def test_honest_updates_are_never_refused(llama):
    for name in KINDS:
        for options in ({}, {"aggregation": "keep_old"}, {"aggregation": "masked_mean"}) if name == "soft" else ({},):
            rounds, _ = finished(make_experiment(llama, method={"name": name, **options}, updates={"max_norm": 1e3}))
            assert not [record for done in rounds for record in done.records if record.refused]


def server_in_round_one(llama):
    experiment = make_experiment(llama)
    prepared = assemble(experiment, DATA)
    server = Server()
    server.begin(experiment, prepared.shapes, 2, pack({"score.weight": torch.zeros(3, 16)}), "this-run")
    method = build_method("fedit", {})
    client = Client(id="c", profile="small", rank=2, num_examples=3)
    dispatch = method.dispatch(server._state, client, Budget(rank=2), torch.Generator())
    return server, method.lift(dispatch, dispatch.payload, 3.0)


def test_duplicates_and_updates_of_other_rounds_are_counted_and_change_nothing(llama):
    server, partial = server_in_round_one(llama)
    other, _ = server_in_round_one(llama)
    for index in range(2):
        other.fold(index, pack_partial(partial, run="this-run", round=0))
    other.finish(2)

    server.fold(0, pack_partial(partial, run="this-run", round=0))
    server.fold(0, pack_partial(partial, run="this-run", round=0))  # merged already
    server.fold(1, pack_partial(partial, run="this-run", round=7))
    server.fold(1, pack_partial(partial, run="another", round=0))
    server.fold(1, pack_partial(partial, run="this-run", round=0))
    facts = server.finish(2)

    assert (facts["refused/duplicate"], facts["refused/stale"]) == (1, 2)
    left, right = server.snapshot().state, other.snapshot().state
    assert (left.buffer == right.buffer).all()
    assert "refused/duplicate" not in server_in_round_one(llama)[0].snapshot().state.meta


def test_an_empty_chunk_of_another_round_does_not_stand_in_for_this_one(llama):
    server, partial = server_in_round_one(llama)
    other, _ = server_in_round_one(llama)
    empty = Partial(weight=0.0, count=0)

    server.fold(0, pack_partial(empty, run="this-run", round=7))
    server.fold(0, pack_partial(partial, run="this-run", round=0))
    server.fold(1, pack_partial(empty, run="this-run", round=0))
    facts = server.finish(2)
    other.fold(0, pack_partial(partial, run="this-run", round=0))
    other.finish(1)

    assert facts["refused/stale"] == 1
    assert "refused/duplicate" not in facts
    assert (server.snapshot().state.buffer == other.snapshot().state.buffer).all()


@pytest.mark.parametrize("name", KINDS)
def test_clipping_shortens_changes_and_nothing_else(llama, name):
    """A bound that nobody reaches leaves every bit; one that all pass lets the model move by at most its length."""
    plain, adapter = finished(make_experiment(llama, rounds=1, method={"name": name}))
    loose, same = finished(make_experiment(llama, rounds=1, method={"name": name}, updates={"clip_norm": 1e6}))
    assert loose[1].metrics["eval/loss"] == plain[1].metrics["eval/loss"]
    assert all(torch.equal(tensor, same.tensors()[key]) for key, tensor in adapter.tensors().items())

    tight, _ = finished(make_experiment(llama, rounds=1, method={"name": name}, updates={"clip_norm": 1e-9}))
    start = plain[0].metrics["eval/loss"]
    assert abs(plain[1].metrics["eval/loss"] - start) > 1e-4
    if name != "soft":  # with zero_fill, ranks that nobody sends are lost whatever is sent
        assert tight[1].metrics["eval/loss"] == pytest.approx(start, abs=1e-5)


@pytest.mark.parametrize("count", range(3, 12))
def test_the_default_trim_cuts_off_a_liar_in_the_smallest_cohort_too(count):
    rows = torch.zeros(count, 2, dtype=torch.float64)
    rows[0] = 1e5
    default = Experiment().updates.trim
    assert not Robust(build_method("fedit", {}), rule="trimmed_mean", trim=default)._middle(rows).any()


def test_a_share_that_comes_to_whole_updates_is_not_rounded_away():
    rows = torch.arange(100.0, dtype=torch.float64)[:, None].square()
    for trim in (0.07, 0.28, 0.29):  # in binary 0.29 x 100 is below 29 and 0.28 x 100 above 28
        cut = round(trim * 100)
        middle = Robust(build_method("fedit", {}), rule="trimmed_mean", trim=trim)._middle(rows)
        assert torch.equal(middle, rows[cut : 100 - cut].mean(dim=0))


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@pytest.mark.parametrize("name", [name for name in method_names() if method_class(name).traits.aligned])
def test_robust_rules_withstand_a_minority_of_liars(llama, monkeypatch, name, rule):
    """One liar of six: the mean is carried away, the robust rule stays among the honest ones."""
    spoil = spoilt(lambda tensor: tensor + 100.0)
    described = {"rounds": 1, "method": {"name": name}, "cohort": {"size": 6}}
    honest, _ = finished(make_experiment(llama, **described, updates={"rule": rule, "trim": 0.2}))
    robust, kept = play_with(
        monkeypatch, make_experiment(llama, **described, updates={"rule": rule, "trim": 0.2}), "c2", spoil
    )
    mean, carried = play_with(monkeypatch, make_experiment(llama, **described), "c2", spoil)

    name_of = next(iter(kept.head if name == "head_only" else kept.tensors()))
    tensors = (kept.head, carried.head) if name == "head_only" else (kept.tensors(), carried.tensors())
    assert tensors[0][name_of].abs().max() < 2
    assert tensors[1][name_of].abs().max() > 10
    assert robust[1].metrics["eval/loss"] == pytest.approx(honest[1].metrics["eval/loss"], abs=0.05)
    assert mean[1].records[0].refused is None


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_robust_rules_are_those_of_the_definition_whatever_the_chunks(llama, rule):
    adapters = [
        finished(make_experiment(llama, chunk_size=size, cohort={"size": 5}, updates={"rule": rule, "trim": 0.25}))[1]
        for size in (1, 2, 5)
    ]
    for other in adapters[1:]:
        assert all(torch.equal(tensor, other.tensors()[key]) for key, tensor in adapters[0].tensors().items())

    rows = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middle = Robust(build_method("fedit", {}), rule=rule, trim=0.25)._middle(rows)
    expected = rows.median(dim=0).values if rule == "median" else rows.sort(dim=0).values[2:5].mean(dim=0)
    torch.testing.assert_close(middle, expected)


def test_rows_cross_processes(llama):
    partial = Partial(weight=2.0, count=2, rows={"a": torch.arange(6.0).view(2, 3)})
    assert torch.equal(unpack_partial(pack_partial(partial)).rows["a"], partial.rows["a"])


PRIVATE = {"clip_norm": 0.5, "noise_multiplier": 1.0}


def test_noise_has_the_stated_deviation_and_repeats(llama):
    _, adapter = finished(make_experiment(llama, rounds=1, updates=PRIVATE))
    _, again = finished(make_experiment(llama, rounds=1, updates=PRIVATE))
    assert all(torch.equal(tensor, again.tensors()[key]) for key, tensor in adapter.tensors().items())

    class Kept:
        traits = method_class("fslora").traits

        def finish(self, state, merged):
            return merged

    zeros = Partial(weight=4.0, count=4, sums={"a": torch.zeros(400, 500)})
    server, _ = server_in_round_one(llama)
    noise = Noisy(Kept(), deviation=0.3, seed=1, places=4).finish(server._state, zeros).sums["a"]
    assert float(noise.std()) == pytest.approx(0.3, rel=0.01)
    assert abs(float(noise.mean())) < 5 * 0.3 / math.sqrt(noise.numel())


def test_little_noise_and_a_wide_clip_come_to_the_mean_of_equal_clients(llama):
    """With noise that vanishes the round is that of FedIT over clients that all weigh the same."""
    quiet = {"clip_norm": 1e3, "noise_multiplier": 1e-12}
    for name in ADDITIVE:
        _, private = finished(make_experiment(llama, rounds=1, method={"name": name}, updates=quiet))
        data = dataclasses.replace(DATA, clients={client: indices[:12] for client, indices in DATA.clients.items()})
        experiment = make_experiment(llama, rounds=1, method={"name": name})
        _, plain = finished(experiment, data)
        _, private = finished(experiment.model_copy(update={"updates": experiment.updates.model_validate(quiet)}), data)
        for key, tensor in plain.tensors().items():
            torch.testing.assert_close(private.tensors()[key], tensor, rtol=1e-5, atol=1e-6)


def sent_by(dispatch, change):
    """Return an update that differs by ``change`` in each of its ``n`` coordinates, over the root of ``n``."""
    tensors = dispatch.payload.tensors
    each = change / math.sqrt(sum(tensor.numel() for tensor in tensors.values()))
    start = {
        name: tensor if dispatch.sends == "values" else torch.zeros_like(tensor) for name, tensor in tensors.items()
    }
    return Payload(tensors={name: tensor + each for name, tensor in start.items()})


@pytest.mark.parametrize("name", ADDITIVE)
def test_one_client_more_moves_the_model_by_at_most_its_share_of_the_clipping_norm(name):
    """What the noise is measured against: (clip_norm / places), wherever the other clients have gone."""
    places, clip_norm = 4, 0.5
    method = Noisy(build_method(name, {}), deviation=0.0, seed=0, places=places)
    shapes, head = {"q": (6, 5)}, {"w": torch.randn(3, 6, generator=torch.Generator().manual_seed(1))}
    state = method.init(Template(shapes=shapes, head=head, rank=4, scale=2.0), torch.Generator().manual_seed(0))

    def after(changes):
        fold = Fold()
        for index, change in enumerate(changes):
            client = Client(id=f"c{index}", profile="p", rank=4, num_examples=5 + index)
            dispatch = method.dispatch(state, client, Budget(rank=4), torch.Generator().manual_seed(index))
            assert dispatch.sends == method.traits.additive
            fold.add(method.lift(dispatch, sent_by(dispatch, change), float(client.num_examples)))
        return method.finish(state, fold.result()).adapter.tensors()

    for others in ([clip_norm] * 3, [-clip_norm] * 2, [0.0, clip_norm, 0.3], [0.0]):
        without = after(others)
        for change in (clip_norm, -clip_norm, 0.2):
            moved = norm_of(
                {key: new.double() - without[key].double() for key, new in after([*others, change]).items()}
            )
            assert moved == pytest.approx(abs(change) / places, rel=1e-4)


def test_epsilon_is_the_library_s_and_is_logged_every_round(llama):
    experiment = make_experiment(llama, rounds=3, updates=PRIVATE | {"delta": 1e-3})
    rounds, _ = finished(experiment)
    accountant = RDPAccountant()
    for done in rounds[1:]:
        accountant.step(noise_multiplier=1.0, sample_rate=4 / 6)
        assert done.metrics["privacy/epsilon"] == pytest.approx(accountant.get_epsilon(delta=1e-3))
    assert rounds[1].metrics["privacy/epsilon"] < rounds[3].metrics["privacy/epsilon"]
    assert epsilon_after(experiment, 0, 6) == 0
    assert epsilon_after(Experiment(), 1, 6) == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": {"name": "flexlora"}, "updates": {"rule": "median"}},
            "do not have the same ones.*: fed_sb, fedit, .*head_only",
        ),
        ({"method": {"name": "fslora"}, "updates": {"rule": "trimmed_mean"}}, "clip_norm works for all methods"),
        (
            {"method": {"name": "florist"}, "updates": PRIVATE},
            "mean of changes, and 'florist' does not.*fedit, .*fslora",
        ),
        ({"cohort": {"size": 4, "sampler": "by_examples"}, "updates": PRIVATE}, "uniformly sampled cohorts"),
        (
            {
                "population": {"profiles": [{"name": "p", "share": 1, "rank": 2, "availability": 0.5}]},
                "updates": PRIVATE,
            },
            "sampled more often than epsilon is counted for",
        ),
        (
            {"method": {"name": "fslora"}, "controller": {"name": "tsfa", "latency_limit_s": 1.0}, "updates": PRIVATE},
            "'tsfa' decides by what clients have sent",
        ),
    ],
)
def test_what_is_not_sound_is_refused_before_a_machine_is_asked_for(llama, changes, message):
    experiment = make_experiment(llama, **changes)
    with pytest.raises(ExperimentError, match=message):
        global_rank(experiment, assemble(experiment, DATA))


@pytest.mark.parametrize(
    ("controller", "network"),
    [
        ({"name": "tsfa", "latency_limit_s": 1.0, "importance": "uniform"}, "links"),
        ({"name": "greedy_deadline", "deadline_s": 1.0}, "links"),
        ({"name": "fixed"}, "ideal"),
    ],
)
def test_controllers_that_read_no_updates_go_with_noise(llama, controller, network):
    experiment = make_experiment(
        llama, method={"name": "fslora"}, controller=controller, network={"kind": network}, updates=PRIVATE
    )
    assert global_rank(experiment, assemble(experiment, DATA)) == 4


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"noise_multiplier": 1.0}, "set updates.clip_norm, e.g. 1.0"),
        (PRIVATE | {"rule": "median"}, "goes with rule 'mean', not 'median'"),
        ({"clip_norm": 0}, "updates.clip_norm: 0 is not allowed"),
        ({"trim": 0.5}, "updates.trim: 0.5 is not allowed"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(updates, message):
    with pytest.raises(ExperimentError, match=message):
        validated({"updates": updates}, place="experiment.yaml")
