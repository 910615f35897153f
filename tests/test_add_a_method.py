"""The method on the page that says how to add one: short, registered by one line, and right."""

import sys

import pytest
import torch
from documents import ROOT, blocks
from rounds import apart, exported, play, start
from small import finished, make_experiment, save_llama

import fedloom.methods

PAGE = ROOT / "docs" / "how-to" / "add-a-method.md"
(CODE,) = (block.text for block in blocks(PAGE) if block.language == "python")


@pytest.fixture
def damped(tmp_path, monkeypatch):
    """Put the page's own block into a file, and enter it as the page says."""
    (tmp_path / "damped.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(fedloom.methods.CATALOGUE, "damped", "damped:Damped")
    yield
    sys.modules.pop("damped", None)


def test_the_page_keeps_its_word():
    """Fewer than sixty lines, blank ones included."""
    assert len(CODE.splitlines()) < 60


@pytest.mark.usefixtures("damped")
def test_with_a_learning_rate_of_one_it_is_fedit():
    """What was there plus the mean change is the mean, up to float64's rounding, round after round."""
    models = []
    for name, options in (("fedit", {}), ("damped", {"server_lr": 1.0})):
        method, state = start(name, options)
        for _ in range(3):
            state, _ = play(method, state)
        models.append(exported(method, state))

    assert apart(*models) < 1e-12


@pytest.mark.usefixtures("damped")
def test_it_runs_as_an_experiment_and_goes_a_part_of_the_way(tmp_path):
    """One round through the real driver: every tensor has moved by eta times FedIT's change."""
    folder = save_llama(tmp_path / "model")
    ends = {}
    for name, options in (("fedit", {}), ("damped", {"server_lr": 0.25}), ("still", {"server_lr": 0.0})):
        method = {"name": "fedit" if name == "fedit" else "damped", **options}
        rounds, adapter = finished(make_experiment(folder, rounds=1, method=method))
        assert len(rounds) == 2
        ends[name] = adapter.tensors()

    for name, before in ends["still"].items():
        torch.testing.assert_close(ends["damped"][name], before + 0.25 * (ends["fedit"][name] - before))
