"""``fedloom aggregate``: real PEFT writes what clients send and reads what comes of it; the oracle is dense float64."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    EXAMPLES,
    UNEQUAL,
    Clients,
    Q,
    aggregate,
    apart,
    loaded,
    merged,
    model_of,
    products_of,
    train,
    trained,
)
from safetensors.torch import load_file
from saved import edit_weights
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.platform.foreign_adapters import look_at
from fedloom.platform.merging import why_not
from fedloom.platform.registry import build_method, method_class, method_names

EQUAL = {"one": {"r": 3, "lora_alpha": 3}, "two": {"r": 3, "lora_alpha": 6}, "three": {"r": 3, "use_rslora": True}}
USABLE = [name for name in method_names() if why_not(build_method(name, {})) is None]
HOLDS = 1e-5  # relative, for values in float32


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return trained(tmp_path_factory.mktemp("unequal"), UNEQUAL)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return trained(tmp_path_factory.mktemp("equal"), EQUAL, rank_pattern={"down_proj": 2})


@pytest.mark.parametrize(
    "method", [["flora"], ["florist", "--set", "tau=1"], ["fedhl"], ["flexlora", "--rank", "12"]], ids=lambda m: m[0]
)
def test_the_mean_of_what_the_clients_models_add(method: list[str], unequal: Clients, tmp_path: Path):
    """An exact method's product is the weighted mean of the clients' own, whatever ranks, alphas and patterns say."""
    folder = merged(tmp_path / "merged", unequal, *method)

    assert apart(products_of(loaded(folder)), unequal.mean()) < HOLDS


@pytest.mark.parametrize("name", ["fedex", "fedmomentum"])
def test_the_mean_also_where_one_rank_is_asked_for(name: str, equal: Clients, tmp_path: Path):
    """Equal ranks, unequal scales; modules may differ in rank as long as clients do not."""
    folder = merged(tmp_path / "merged", equal, name)

    assert apart(products_of(loaded(folder)), equal.mean()) < HOLDS


def test_peft_computes_with_the_mean(unequal: Clients, tmp_path: Path):
    """A forward pass through PEFT is one through weights to which the mean was added by hand; ranks are patterns."""
    folder = merged(tmp_path / "merged", unequal, "flora")
    tokens = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(5))
    by_hand = model_of(LlamaForCausalLM)
    before = by_hand(tokens).logits
    with torch.no_grad():
        for module, change in unequal.mean().items():
            by_hand.get_submodule(module).weight += change.float()
    config = json.loads((folder / "adapter_config.json").read_text())

    torch.testing.assert_close(loaded(folder)(tokens).logits, by_hand(tokens).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, by_hand(tokens).logits, atol=1e-2)
    assert config["r"] == 12
    assert set(config["rank_pattern"].values()) == {9}


def test_weights_that_lie_the_other_way_round(tmp_path: Path):
    """GPT-2 stores (d_in, d_out): the result says so too, and its products are the mean."""
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    products = [train(tmp_path / name, GPT2LMHeadModel, len(name), r=2, **options) for name in ("one", "three")]
    clients = Clients((tmp_path / "one", tmp_path / "three"), tuple(products))
    folder = merged(tmp_path / "merged", clients, "flora", examples=(1, 3))

    assert apart(products_of(loaded(folder, GPT2LMHeadModel)), clients.mean((1, 3))) < HOLDS
    assert look_at(folder).origin.fan_in_fan_out  # PEFT would mend it, with a warning


def test_flexlora_loses_the_tail_of_the_spectrum_alone(unequal: Clients, tmp_path: Path):
    """Eckart-Young, at the largest rank of a client unless another is asked for, and at each client's own."""
    mean = unequal.mean()
    own = {"one": (4, 4), "two": (2, 2), "three": (3, 6)}
    given = {merged(tmp_path / "default", unequal, "flexlora"): (6, 6)}
    given[merged(tmp_path / "five", unequal, "flexlora", "--rank", 5)] = (5, 5)
    each = merged(tmp_path / "each", unequal, "flexlora", "--per-client")
    given |= {each / name: ranks for name, ranks in own.items()}

    assert {path.name for path in each.iterdir()} == set(own)
    for folder, (rank, down_rank) in given.items():
        found = products_of(loaded(folder))
        for module, wanted in mean.items():
            kept = down_rank if module.endswith("down_proj") else rank
            tail = float(torch.linalg.svdvals(wanted)[kept:].norm())
            assert look_at(folder).ranks[module] == kept
            assert abs(float((wanted - found[module]).norm()) - tail) < HOLDS * float(wanted.norm())


@pytest.mark.parametrize("name", USABLE)
def test_a_single_adapter_stays_what_it_is(name: str, unequal: Clients, tmp_path: Path):
    """A federation of one is plain LoRA; FLoRIST alone cuts its spectrum, unless tau is 1."""
    one = Clients(unequal.folders[2:], unequal.products[2:])
    options = ["--set", "tau=1"] if name == "florist" else []
    folder = merged(tmp_path / "merged", one, name, *options, examples=(5,))

    assert apart(products_of(loaded(folder)), one.mean((5,))) < HOLDS


def test_scales_are_folded_where_factors_are_averaged(equal: Clients, tmp_path: Path):
    """FedIT's A is the plain mean of the clients' A; its B is the mean of theirs times their scales."""
    folder = merged(tmp_path / "merged", equal, "fedit")
    shares = [count / sum(EXAMPLES) for count in EXAMPLES]
    scales = (1.0, 2.0, 8 / 3**0.5)
    tensors = [load_file(client / "adapter_model.safetensors") for client in equal.folders]
    found, key = load_file(folder / "adapter_model.safetensors"), f"base_model.model.{Q}.lora_{{}}.weight"
    A = sum(share * each[key.format("A")] for share, each in zip(shares, tensors, strict=True))
    B = sum(p * s * each[key.format("B")] for p, s, each in zip(shares, scales, tensors, strict=True))

    torch.testing.assert_close(found[key.format("A")], A)
    torch.testing.assert_close(found[key.format("B")], B)


@pytest.mark.parametrize("name", [name for name in method_names() if name not in USABLE])
def test_other_methods_are_refused_with_the_reason(name: str, unequal: Clients, tmp_path: Path):
    done = aggregate(*unequal.folders, "--method", name, "-o", tmp_path / "merged")

    assert done.exit_code == 2
    assert done.output.startswith(f"error: --method {name} cannot merge adapters that it did not send out: its ")
    assert "Methods that can: fedex, fedhl, fedit, fedmomentum, flexlora, flora, florist," in done.output
    assert not list(tmp_path.iterdir())


def test_what_a_method_needs_is_found_in_what_it_does():
    """An option can make the difference, and so can what only a second round shows."""
    assert why_not(build_method("zero_padding", {"padding": "values"})) is None
    assert "changed what they downloaded" in why_not(build_method("zero_padding", {"padding": "change"}))
    assert "trained and rotated" in why_not(build_method("fedrot", {}))
    assert "depends on the server's model" in why_not(build_method("fedopt", {}))
    assert not {"fslora", "soft", "ffa", "local_only", "fedsa", "head_only"} & set(USABLE)


def classifiers(folder: Path, **options: Any) -> Clients:
    common = {"r": 2, "task_type": "SEQ_CLS"} | options
    names = ("one", "two", "three")
    products = [train(folder / name, LlamaForSequenceClassification, i, **common) for i, name in enumerate(names)]
    return Clients(tuple(folder / name for name in names), tuple(products))


def test_heads_are_averaged(tmp_path: Path):
    clients = classifiers(tmp_path)
    folder = merged(tmp_path / "merged", clients, "florist", "--set", "tau=1")
    heads = [load_file(each / "adapter_model.safetensors")["base_model.model.score.weight"] for each in clients.folders]
    mean = sum(count / sum(EXAMPLES) * head for count, head in zip(EXAMPLES, heads, strict=True))
    model = loaded(folder, LlamaForSequenceClassification)

    torch.testing.assert_close(model.get_submodule("base_model.model.score").weight, mean)
    assert apart(products_of(model), clients.mean()) < HOLDS


def test_a_head_that_only_some_have_is_refused(tmp_path: Path):
    clients = classifiers(tmp_path)
    edit_weights(clients.folders[1], lambda tensors: tensors.pop("base_model.model.score.weight"))
    done = aggregate(*clients.folders, "--method", "flora", "-o", tmp_path / "merged")

    assert done.exit_code == 2
    assert "two does not fit" in done.output
    assert "trained tensor 'score.weight' is in" in done.output


def test_examples_may_stand_in_a_row_or_be_repeated(unequal: Clients, tmp_path: Path):
    """Both spellings, and what follows a row, mean the same files."""
    folders = [str(folder) for folder in unequal.folders]
    rows = [
        [*folders, "--method", "flora", "--examples", "120", "80", "7", "-o"],
        ["--examples", "120", "80", "7", "--method", "flora", *folders, "-o"],
        ["--examples", "120", *folders, "--examples", "80", "--examples", "7", "--method", "flora", "-o"],
    ]
    results = []
    for index, row in enumerate(rows):
        done = CliRunner().invoke(app, ["aggregate", *row, str(tmp_path / str(index))])
        assert done.exit_code == 0, done.output
        results.append({file.name: file.read_bytes() for file in (tmp_path / str(index)).iterdir()})

    assert results[0] == results[1] == results[2]
    assert set(results[0]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_traits_agree_with_what_is_merged():
    """Every method that takes unequal ranks and can merge takes them by module too, as PEFT's patterns need."""
    assert all(method_class(name).traits.ranks_by_module for name in USABLE if method_class(name).traits.heterogeneous)


@pytest.mark.parametrize(
    ("step", "said"), [("write_files", "nothing was written"), ("_told", ".* is written as a whole")]
)
def test_ctrl_c_leaves_all_or_nothing_and_says_which(
    step: str, said: str, equal: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"fedloom.jobs.aggregate.{step}", lambda *_: signal.raise_signal(signal.SIGINT))
    done = aggregate(*equal.folders, "--method", "flexlora", "-o", tmp_path / "merged")

    assert done.exit_code == 130
    assert re.fullmatch(f"interrupted\n{said}\n", done.stderr)
    assert len(list(tmp_path.rglob("*.*"))) == (2 if step == "_told" else 0)
