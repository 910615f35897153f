"""What ``fedloom aggregate`` refuses or remarks on: adapters, arguments, places; in a line, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import UNEQUAL, Clients, Q, aggregate, edit_config, merged, trained, without
from safetensors.torch import load_file
from saved import edit_weights

from fedloom.platform.foreign_adapters import look_at


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return trained(tmp_path_factory.mktemp("unequal"), UNEQUAL)


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
