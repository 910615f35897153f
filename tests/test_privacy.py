"""Noise that hides single clients: how much, against what, how it is counted, and what it does not go with."""

import dataclasses
import math

import pytest
import torch
from opacus.accountants import RDPAccountant
from small import finished, make_experiment, save_llama
from spoilt import DATA, server_in_round_one

from fedloom.platform.adapter import Template
from fedloom.platform.aggregation import Noisy
from fedloom.platform.client import Budget, Client
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.method import Payload
from fedloom.platform.partial import Fold, Partial
from fedloom.platform.preparation import assemble, global_rank
from fedloom.platform.privacy import epsilon_after
from fedloom.platform.registry import build_method, method_class, method_names
from fedloom.platform.updates import norm_of

PRIVATE = {"clip_norm": 0.5, "noise_multiplier": 1.0}
ADDITIVE = [name for name in method_names() if method_class(name).traits.additive]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


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
