"""``fedloom aggregate``: real PEFT writes what clients send and reads what comes of it; the oracle is dense float64."""

import gc
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rounds import factors as drawn_factors
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.platform.adapter import Adapter, Template
from fedloom.platform.foreign_adapters import look_at
from fedloom.platform.merging import Contribution, merge_round, why_not
from fedloom.platform.registry import build_method, method_class, method_names

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"
# Alphas, ranks and what PEFT makes of them differ between all three, and in the third one between modules.
UNEQUAL = {
    "one": {"r": 4, "lora_alpha": 8},
    "two": {"r": 2, "lora_alpha": 6, "use_rslora": True},
    "three": {"r": 3, "lora_alpha": 5, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"1.self_attn.v_proj": 9}},
}
EQUAL = {"one": {"r": 3, "lora_alpha": 3}, "two": {"r": 3, "lora_alpha": 6}, "three": {"r": 3, "use_rslora": True}}
EXAMPLES = (120, 80, 7)
USABLE = [name for name in method_names() if why_not(build_method(name, {})) is None]
HOLDS = 1e-5  # relative, for values in float32


@dataclass(frozen=True)
class Clients:
    """Folders that PEFT wrote, and the changes of the weights that PEFT itself makes of them, in float64."""

    folders: tuple[Path, ...]
    products: tuple[Mapping[str, torch.Tensor], ...]

    def mean(self, examples: Sequence[int] = EXAMPLES) -> dict[str, torch.Tensor]:
        shares = [count / sum(examples) for count in examples]
        return {
            module: sum(share * one[module] for share, one in zip(shares, self.products, strict=True))
            for module in self.products[0]
        }


def model_of(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind is GPT2LMHeadModel:
        return kind(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    labels = {"num_labels": 3} if kind is LlamaForSequenceClassification else {}
    return kind(LlamaConfig(**LLAMA, **labels)).eval()


def products_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what PEFT adds to each weight, as it lies in memory, in float64."""
    changes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            pair = [part["default"].weight.detach().double() for part in (layer.lora_B, layer.lora_A)]
            product = layer.scaling["default"] * pair[0] @ pair[1]
            changes[name.removeprefix("base_model.model.")] = product.T if layer.fan_in_fan_out else product
    return changes


def train(folder: Path, kind: type[PreTrainedModel], seed: int, **options: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors and head, and return its products."""
    options = {"task_type": "CAUSAL_LM", "target_modules": TARGETS} | options
    model = get_peft_model(model_of(kind), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return products_of(model)


def trained(folder: Path, clients: Mapping[str, Mapping[str, Any]], **common: Any) -> Clients:
    products = [
        train(folder / name, LlamaForCausalLM, seed, **common, **options)
        for seed, (name, options) in enumerate(clients.items())
    ]
    return Clients(tuple(folder / name for name in clients), tuple(products))


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return trained(tmp_path_factory.mktemp("unequal"), UNEQUAL)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return trained(tmp_path_factory.mktemp("equal"), EQUAL, rank_pattern={"down_proj": 2})


def aggregate(*arguments: object, examples: Sequence[object] = EXAMPLES) -> Any:
    return CliRunner().invoke(app, ["aggregate", *map(str, arguments), "--examples", *map(str, examples)])


def merged(out: Path, clients: Clients, *arguments: object, examples: Sequence[int] = EXAMPLES) -> Path:
    done = aggregate(*clients.folders, "-o", out, "--method", *arguments, examples=examples)
    assert done.exit_code == 0, done.output
    return out


def loaded(folder: Path, kind: type[PreTrainedModel] = LlamaForCausalLM) -> PeftModel:
    return PeftModel.from_pretrained(model_of(kind), str(folder)).eval()


def apart(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


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


def live_bytes() -> int:
    """Return the memory of all tensors that there are, storages once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured(name: str, count: int) -> list[int]:
    """Return the memory of all new tensors at the moments before each of ``count`` adapters is read."""
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    seen = []

    def read(index: int) -> Callable[[], Adapter]:
        def values() -> Adapter:
            seen.append(live_bytes())
            return Adapter(factors={"module": drawn_factors(300, 4, 400, seed=index)}, head={}, scale=1.0)

        return values

    def all_of_them() -> Iterator[Contribution]:
        for index in range(count):
            yield Contribution(name=str(index), num_examples=1, ranks={"module": 4}, read=read(index))

    template = Template(shapes={"module": (300, 400)}, head={}, rank=4, scale=1.0)
    try:
        merge_round(build_method(name, {}), template, all_of_them())
    finally:
        gc.unfreeze()
    return seen


@pytest.mark.parametrize("name", ["fedit", "zero_padding", "hetlora", "per_index"])
def test_sums_hold_one_adapter_however_many_come(name: str):
    """After the second adapter, the memory before each further one is the same: none of those before it is alive."""
    seen = measured(name, 8)

    assert len(set(seen[1:])) == 1


def test_stacks_grow_by_the_factors_of_each(unequal: Clients):
    """So that the test above would see adapters that are kept."""
    seen = measured("flora", 8)
    steps = {after - before for before, after in pairwise(seen)}

    assert steps == {8 * 4 * (300 + 400)}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def without(tensors: dict[str, torch.Tensor], module: str) -> None:
    for factor in "AB":
        tensors.pop(f"base_model.model.{module}.lora_{factor}.weight")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def wider(tensors: dict[str, torch.Tensor]) -> None:
    key = f"base_model.model.{Q}.lora_B.weight"
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def filled(value: float, factor: str = "A") -> Callable[[Path], None]:
    key = f"base_model.model.{Q}.lora_{factor}.weight"
    return lambda folder: edit_weights(folder, lambda tensors: tensors[key][0].fill_(value))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing module": (lambda f: edit_weights(f, lambda t: without(t, Q)), f"module '{Q}' is in"),
    "no LoRA": (lambda f: edit_config(f, peft_type="IA3"), "only 'LORA' is supported"),
    "a pickle": (pickled, "adapter_model.bin, a pickle, which runs code"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "is no adapter folder"),
    "another shape": (lambda f: edit_weights(f, wider), f"'{Q}' changes a weight of (32, 16), there one of (16, 16)"),
    "NaN": (filled(float("nan")), f"tensor '{Q}.A' is not finite"),
    "infinity": (filled(float("inf"), "B"), f"tensor '{Q}.B' is not finite"),
    "too large": (filled(1e30), f"tensor '{Q}.A' has the norm"),
    "a huge alpha": (lambda f: edit_config(f, lora_alpha=1e300), "is not finite"),
    "alpha that is no number": (lambda f: edit_config(f, lora_alpha="8"), "no rank and alpha for module"),
    "another rank": (lambda f: edit_config(f, r=3), "has rank 3 in adapter_config.json but 2 in"),
    "one factor": (
        lambda f: edit_weights(f, lambda t: t.pop(f"base_model.model.{Q}.lora_A.weight")),
        f"module '{Q}' has one factor without the other",
    ),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora is True"),
    "aLoRA": (lambda f: edit_config(f, alora_invocation_tokens=[1]), "alora_invocation_tokens is set"),
    "biases": (lambda f: edit_config(f, bias="lora_only"), "bias is 'lora_only'"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa"), "which changes the base weights as well"),
    "a loose tensor": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "tensor 'lm_head.weight' belongs to no LoRA layer",
    ),
    "another task": (lambda f: edit_config(f, task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    "no task": (lambda f: edit_config(f, task_type=3), "task_type is 3, not a text"),
    "an unknown task": (lambda f: edit_config(f, task_type="TALK"), "task_type is 'TALK'; allowed are SEQ_CLS"),
    "transposed": (lambda f: edit_config(f, fan_in_fan_out=True), "fan_in_fan_out is True"),
    "a loop of a pattern": (lambda f: edit_config(f, rank_pattern={"(a+)+$": 2}), "rank_pattern has the pattern"),
}


def small_clients(folder: Path, unequal: Clients) -> list[Path]:
    """Copy two clients' folders to where they can be damaged."""
    copies = []
    for source, name in zip(unequal.folders, ("kept", "damaged"), strict=False):
        (folder / name).mkdir()
        for file in source.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        copies.append(folder / name)
    return copies


@pytest.mark.parametrize("damage", REFUSED)
def test_bad_adapters_are_refused_by_folder_and_place(damage: str, unequal: Clients, tmp_path: Path):
    """Exit code 2, one line that names the folder, no traceback, and nothing left behind."""
    folders = small_clients(tmp_path, unequal)
    change, message = REFUSED[damage]
    change(folders[1])
    done = aggregate(*folders, "--method", "flora", "-o", tmp_path / "new" / "merged", examples=(2, 1))

    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    assert "damaged" in done.output
    assert message in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "damaged"}


@pytest.mark.parametrize(
    ("arguments", "examples", "message"),
    [
        (["--method", "flora"], (1,), "--examples has 1 numbers for 2 folders"),
        (["--method", "flora"], (1, 2, 3), "--examples has 3 numbers for 2 folders"),
        (["--method", "flora"], (1, 0), "--examples 0 of "),
        (["--method", "flora"], (1, -5), "--examples -5 of "),
        (["--method", "flora"], (-1, 5), "--examples -1 of "),
        (["--method", "flora"], (10**400, 5), "allowed are 1 to 2147483647"),
        (["--method", "flora"], (1, "x"), ", x); give one for each"),
        (["--method", "flora", "--rank", 10**12], (1, 2), "takes"),
        (["--method", "floris"], (1, 2), "no method called 'floris'. Did you mean 'florist'?"),
        (["--method", "florist", "--set", "tau=2"], (1, 2), "key method.tau: 2 is not allowed"),
        (["--method", "florist", "--set", "tua=1"], (1, 2), "Did you mean 'tau'?"),
        (["--method", "florist", "--set", "tau"], (1, 2), "write it as key=value"),
        (["--method", "fedit"], (1, 2), "Methods for unequal ranks: fedhl, flexlora, flora, florist, hetlora"),
        (["--method", "flora", "--rank", 3], (1, 2), "Methods that do: fedhl, flexlora, hetlora"),
        (["--method", "flora", "--per-client"], (1, 2), "this method hands out no smaller one"),
        (["--method", "flexlora", "--per-client", "--rank", 3], (1, 2), "it excludes --per-client"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    arguments: list[object], examples: tuple[object, ...], message: str, unequal: Clients, tmp_path: Path
):
    done = aggregate(*unequal.folders[:2], *arguments, "-o", tmp_path / "merged", examples=examples)

    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_alone(unequal: Clients, tmp_path: Path):
    """An output with something in it, a file, or a place below a file; an empty folder may be filled."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for place, message in (("full", "is no empty folder"), ("full/mine.txt", "is no empty folder")):
        done = aggregate(*unequal.folders, "--method", "flora", "-o", tmp_path / place)
        assert done.exit_code == 2
        assert message in done.output
    below = aggregate(*unequal.folders, "--method", "flora", "-o", tmp_path / "full" / "mine.txt" / "merged")
    merged(tmp_path / "empty", unequal, "flora")

    assert below.exit_code == 2
    assert "cannot be written" in below.output
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.rglob("*")} == {
        *("full", "mine.txt", "empty", "adapter_config.json", "adapter_model.safetensors")
    }


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


def test_a_folder_counts_once(unequal: Clients, tmp_path: Path):
    one, two, _ = unequal.folders
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "one").symlink_to(two)
    (tmp_path / "again").symlink_to(one)
    twice = aggregate(one, tmp_path / "again", "--method", "flora", "-o", tmp_path / "merged", examples=(1, 1))

    assert twice.exit_code == 2
    assert "are the same folder" in twice.output


def test_results_for_each_client_need_names_of_their_own(unequal: Clients, tmp_path: Path):
    folders = [tmp_path / place for place in ("here/adapter", "there/adapter")]
    for folder, source in zip(folders, unequal.folders, strict=False):
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    done = aggregate(*folders, "--method", "flexlora", "--per-client", "-o", tmp_path / "merged", examples=(1, 1))

    assert done.exit_code == 2
    assert "have the same name" in done.output
    assert not (tmp_path / "merged").exists()


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


def test_other_base_models_are_noted(unequal: Clients, tmp_path: Path):
    """The same model may lie elsewhere on every machine, so that this is no error."""
    folders = small_clients(tmp_path, unequal)
    for folder, base in zip(folders, ("org/model", "/home/bob/model"), strict=True):
        edit_config(folder, base_model_name_or_path=base)
    done = aggregate(*folders, "--method", "flora", "-o", tmp_path / "merged", examples=(2, 1))

    assert done.exit_code == 0
    assert "names the base model '/home/bob/model'" in done.stderr
    assert look_at(tmp_path / "merged").origin.base_model == "org/model"


def test_what_changes_after_the_first_look_is_refused(unequal: Clients, tmp_path: Path):
    _, folder = small_clients(tmp_path, unequal)
    seen = look_at(folder)
    edit_weights(folder, lambda tensors: without(tensors, Q))

    with pytest.raises(Exception, match="has changed since it was looked at"):
        seen.read(1.0)


def test_traits_agree_with_what_is_merged():
    """Every method that takes unequal ranks and can merge takes them by module too, as PEFT's patterns need."""
    assert all(method_class(name).traits.ranks_by_module for name in USABLE if method_class(name).traits.heterogeneous)
