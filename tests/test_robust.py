"""Medians and trimmed means in place of means: a minority of liars moves nothing."""

import pytest
import torch
from small import finished, make_experiment, save_llama
from spoilt import play_with, spoilt

from fedloom.platform.aggregation import Robust
from fedloom.platform.experiment import Experiment
from fedloom.platform.partial import Partial
from fedloom.platform.registry import build_method, method_class, method_names
from fedloom.platform.wire import pack_partial, unpack_partial


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


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
