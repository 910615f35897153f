"""What clients send is checked before it is merged; what is wrong leaves no trace and has a name."""

import dataclasses
import math

import pytest
import torch
from small import KINDS, finished, make_experiment, save_llama
from spoilt import everywhere, first, play_with, play_without, server_in_round_one, spoilt

from fedloom.platform.partial import Partial
from fedloom.platform.wire import pack_partial


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def without_first(payload):
    kept = {name: tensor for name, tensor in payload.tensors.items() if name != first(payload)}
    return dataclasses.replace(payload, tensors=kept)


def renamed(payload):
    tensors = {f"{name}x" if name == first(payload) else name: tensor for name, tensor in payload.tensors.items()}
    return dataclasses.replace(payload, tensors=tensors)


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
