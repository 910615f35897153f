"""TSFA's offline stage (RECONSTRUCTED): its three terms against slow, obvious ones, and the new experiment file."""

import itertools
import math

import numpy as np
import pytest
import torch
from conditions import band, conditions, fading_snr_hz, links
from small import make_data, make_experiment, save_llama
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.jobs.tune_rank import tune_rank
from fedloom.methods.tsfa_band import finish_times
from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment_file import load_experiment
from fedloom.platform.preparation import assemble
from fedloom.tuning.rank_pilot import Local, at_rank, mean_spectrum, pilot, relative_covariance
from fedloom.tuning.structural_rank import (
    Weights,
    best,
    candidate_of,
    candidates_of,
    common_ratio,
    score_ranks,
)

PROFILES = [{"name": "phone", "share": 1, "rank": 4, "compute_gflop_per_s": 0.01}]
TSFA = {"name": "tsfa", "latency_limit_s": 5.0}
SPECTRUM = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0])


def cohort(clients=4, rank=6, shape=(12, 9), modules=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weights = np.random.default_rng(seed).dirichlet(np.ones(clients))
    return [
        Local(
            adapter=Adapter(
                factors={f"m{i}": Factors(B=draw(shape[0], rank), A=draw(rank, shape[1])) for i in range(modules)},
                head={},
                scale=1.0,
            ),
            weight=float(weight),
        )
        for weight in weights
    ]


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("models") / "llama")
    return make_experiment(
        folder,
        name="cell",
        population={"profiles": PROFILES},
        network={"kind": "wireless", "bandwidth_mhz": 0.003},
        controller=TSFA,
        method={"name": "soft"},
    )


@pytest.fixture(scope="module")
def prepared(steered):
    return assemble(steered, make_data())


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_the_covariance_is_that_of_the_dense_products(clients):
    """sum_k w_k (B_k - B)(A_k - A) is the mean product minus the product of the means (identity I1)."""
    locals_ = cohort(clients)
    error = total = 0.0
    for module in locals_[0].adapter.factors:
        pairs = [(local.weight, local.adapter.factors[module]) for local in locals_]
        B = sum(weight * pair.B for weight, pair in pairs)
        A = sum(weight * pair.A for weight, pair in pairs)
        covariance = sum(weight * (pair.B - B) @ (pair.A - A) for weight, pair in pairs)
        error += float(covariance.square().sum())
        total += float(sum(weight * pair.product() for weight, pair in pairs).square().sum())

    assert relative_covariance(locals_) == pytest.approx(error / total, abs=1e-12)
    if clients == 1:
        assert relative_covariance(locals_) < 1e-12


def test_equal_clients_have_no_covariance_and_zero_products_none_either():
    one = cohort(1)[0].adapter
    assert relative_covariance([Local(adapter=one, weight=share) for share in (0.3, 0.7)]) < 1e-12
    silent = Adapter(
        factors={module: Factors(B=0 * pair.B, A=pair.A) for module, pair in one.factors.items()}, head={}, scale=1.0
    )
    assert relative_covariance([Local(adapter=silent, weight=1.0)]) == 0


def test_the_spectrum_is_that_of_the_dense_products():
    locals_ = cohort()
    expected = torch.zeros(6, dtype=torch.float64)
    for local in locals_:
        for pair in local.adapter.factors.values():
            expected += local.weight * torch.linalg.svdvals(pair.product())[:6].square()
    torch.testing.assert_close(mean_spectrum(locals_, 6), expected, rtol=1e-10, atol=1e-10)


def test_larger_ranks_hold_more_and_larger_ratios_leave_out_less():
    found = [candidate_of(rank, SPECTRUM, ratio=0.5, covariance=0.0, weights=Weights()) for rank in range(1, 9)]
    assert all(one.kappa <= other.kappa for one, other in itertools.pairwise(found))
    left_out = [
        candidate_of(8, SPECTRUM, ratio=ratio, covariance=0.0, weights=Weights()).sparsification
        for ratio in np.linspace(0.1, 1, 19)
    ]
    assert all(one >= other for one, other in itertools.pairwise(left_out))
    assert left_out[-1] == 0


def test_a_score_is_the_weighted_sum_of_its_terms():
    weights = Weights(approximation=2.0, sparsification=3.0, covariance=5.0)
    found = candidate_of(4, SPECTRUM, ratio=0.5, covariance=0.25, weights=weights)
    assert found.kappa == 15 / 16
    assert found.sparsification == 3 / 16  # two of four are kept
    assert found.score == pytest.approx(2 * 16 / 15 + 3 * 3 / 16 + 5 * 0.25)


def test_less_than_one_rank_is_infeasible_and_more_than_all_is_all():
    none, one, all_ = (
        candidate_of(4, SPECTRUM, ratio=ratio, covariance=0.0, weights=Weights()) for ratio in (0.249, 0.25, 7.0)
    )
    assert (none.score, one.sparsification, all_.ratio) == (math.inf, 7 / 16, 1.0)


def test_of_equals_the_smaller_rank_is_chosen_and_nothing_feasible_is_an_error():
    flat = torch.tensor([1.0, 0.0, 0.0, 0.0])
    equals = [candidate_of(rank, flat, ratio=1.0, covariance=0.0, weights=Weights()) for rank in (4, 2, 1)]
    assert len({candidate.score for candidate in equals}) == 1
    assert best(equals).rank == 1
    with pytest.raises(ExperimentError, match="no candidate rank can send even one rank"):
        best([candidate_of(2, flat, ratio=0.1, covariance=0.0, weights=Weights())])


@pytest.mark.parametrize("seed", range(5))
def test_with_the_common_ratio_everybody_finishes_at_the_limit(seed):
    known = conditions(band(fading_snr_hz(6, seed)), seed=seed)
    for limit_s in (0.6, 1.0, 3.0):
        ratio = common_ratio(known, limit_s)
        bits = known.fixed_bits + ratio * known.factor_bits
        (finished_s,) = finish_times(
            bits[None], known.before_upload_s, snr_hz=known.channel.snr_hz, bandwidth_hz=known.channel.bandwidth_hz
        )
        assert finished_s == pytest.approx(limit_s, rel=1e-6) if ratio > 0 else finished_s >= limit_s


def test_links_of_their_own_have_the_mean_of_their_ratios():
    known = conditions(links([1e6, 2e6]), before_upload_s=np.array([0.5, 1.0]))
    assert common_ratio(known, 1.0) == 0  # the second client has no time left
    bits = np.array([1.5e6, 2e6])
    assert common_ratio(known, 2.0) == pytest.approx(((bits - known.fixed_bits) / known.factor_bits).mean())
    assert common_ratio(conditions(links([np.inf, np.inf])), 9.0) == math.inf


def test_candidates_are_powers_of_two_that_every_machine_bears(steered, prepared):
    assert candidates_of(steered, prepared) == [1, 2, 4]
    for ranks in ([5], [0], [1, 8]):
        with pytest.raises(ExperimentError, match=r"--rank: rank \d is not among .* 1 to 4"):
            score_ranks(steered, prepared, ranks, pilot_rounds=1, channel_draws=1, weights=Weights())


def test_pilots_repeat_their_bits_and_know_nothing_of_other_candidates(steered, prepared):
    first, again = (pilot(prepared, steered, 2, rounds=2) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.weight == other.weight
        assert all(torch.equal(tensor, other.adapter.tensors()[key]) for key, tensor in one.adapter.tensors().items())
    assert sum(local.weight for local in first) == pytest.approx(1)
    assert {rank for local in first for rank in local.adapter.ranks.values()} == {2}

    def covariance_at_2(ranks):
        found = score_ranks(steered, prepared, ranks, pilot_rounds=1, channel_draws=5, weights=Weights())
        return {candidate.rank: candidate.covariance for candidate in found}[2]

    assert covariance_at_2([2]) == covariance_at_2([1, 2, 4])


def test_a_shorter_limit_affords_smaller_ratios(steered, prepared):
    def ratios(limit_s):
        changed = steered.model_copy(
            update={"controller": steered.controller.model_validate(TSFA | {"latency_limit_s": limit_s})}
        )
        found = score_ranks(changed, prepared, [1, 4], pilot_rounds=1, channel_draws=20, weights=Weights())
        return [candidate.ratio for candidate in found]

    short, long = ratios(0.5), ratios(2.0)
    assert all(one < other or other == 1 for one, other in zip(short, long, strict=True))
    assert short[1] < short[0]  # the limit affords a smaller share of more ranks


def test_the_new_file_is_an_experiment_at_the_chosen_rank(steered, prepared, tmp_path, capsys):
    path = tmp_path / "chosen.yaml"
    options = {"ranks": [1, 2, 4], "pilot_rounds": 1, "channel_draws": 5, "weights": Weights(), "output": path}

    assert tune_rank(prepared, **options) == path

    shown = " ".join(capsys.readouterr().out.split())
    loaded = load_experiment(path)
    assert f"rank {loaded.adapter.rank} has the smallest score" in shown
    assert loaded == at_rank(steered, loaded.adapter.rank)
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_text()
    with pytest.raises(ExperimentError, match="is there already and is not overwritten"):
        tune_rank(prepared, **options)
    assert path.read_text() == before


def test_without_a_limit_there_is_nothing_to_choose_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["tune-rank", "demo"])
    assert done.exit_code == 2
    assert "Set controller.name: tsfa and controller.latency_limit_s" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())
