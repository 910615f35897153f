"""No path that others have a say in leads out of the folder in which it belongs."""

import pickle
from pathlib import Path

import pytest
import torch
from hostile import tries
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from safetensors.torch import save_file
from small import save_llama

from fedloom.platform import run_folder
from fedloom.platform.base_model import ModelSpec, load_base_model
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.data.source import load_rows
from fedloom.platform.errors import AdapterError, CheckpointError, DataError, ModelError
from fedloom.platform.experiment_data import DataSection
from fedloom.platform.peft_layout import CONFIG_NAME, WEIGHTS_NAME
from fedloom.platform.peft_read import load_adapter
from fedloom.platform.reading import inside
from fedloom.platform.rounds import Round
from fedloom.platform.sent import Snapshot
from fedloom.platform.tracking import TrackedRun, TrackingError
from fedloom.platform.whole_files import write_whole
from fedloom.platform.wire import pack

PARTS = st.sampled_from(["a", "..", ".", "", "link", "b.json", "/", "~", "\0", "x" * 300])


@tries(200)
@given(parts=st.lists(PARTS, max_size=5))
def test_what_is_inside_is_inside(tmp_path, parts):
    """Whatever the name: the path that is given back lies in the folder, with no link on its way."""
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to(tmp_path)
        (folder / "a").symlink_to("a")
    try:
        path = inside(folder, "/".join(parts))
    except ValueError:
        return
    assert path.resolve().is_relative_to(folder.resolve())
    assert path.relative_to(folder).parts[:1] not in [("link",), ("a",)]


def adapter_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / CONFIG_NAME).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    tensors = {"A": torch.ones(2, 3), "B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.layer.lora_{factor}.weight": tensor for factor, tensor in tensors.items()},
        folder / WEIGHTS_NAME,
    )
    return folder


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_client_sends_files_not_links(tmp_path, name):
    """A link would have the server read a file of its own in the client's name."""
    honest, sent = adapter_folder(tmp_path / "honest"), adapter_folder(tmp_path / "sent")
    load_adapter(sent)
    (sent / name).unlink()
    (sent / name).symlink_to(honest / name)

    with pytest.raises(AdapterError, match="symbolic link"):
        load_adapter(sent)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter_model.bin"])
def test_a_pickle_that_a_client_sends_is_not_opened(tmp_path, monkeypatch, name):
    """Neither under its own name nor under that of the safetensors file."""
    monkeypatch.chdir(tmp_path)
    folder = adapter_folder(tmp_path / "sent")
    (folder / WEIGHTS_NAME).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(AdapterError, match="never a pickle"):
        load_adapter(folder)
    assert not Path("unpickled").exists()


def test_a_base_model_that_is_a_pickle_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_llama(tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    spec = ModelSpec(
        path=str(folder),
        revision=None,
        dtype="float32",
        task="causal_lm",
        label_names=(),
        pad_token_id=0,
        targets=None,
        dropout=0.0,
    )

    with pytest.raises(ModelError, match=r"cannot be loaded.*safetensors"):
        load_base_model(spec, device="cpu")
    assert not Path("unpickled").exists()


def saved(folder: Path) -> None:
    """Write a checkpoint after round 0."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.add(Round(number=0, metrics={}, records=()))
        checkpoints.save(0, Snapshot(state=pack({"x": torch.ones(2)}, {}), pieces=()), {})


@pytest.mark.parametrize(
    "name",
    ["rounds/000000.json", "checkpoint-000000/progress.json", "checkpoint-000000/manifest.json", "checkpoint-000000"],
)
def test_a_checkpoint_with_a_link_is_passed_over(tmp_path, name):
    """Also if the link leads to the very same bytes."""
    folder = tmp_path / "run"
    saved(folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")

    with Checkpoints(folder) as checkpoints:
        assert checkpoints.load() is None
        assert "symbolic link" in checkpoints.notes[0]


def test_nothing_is_written_through_a_link(tmp_path):
    """Neither through a folder that is one, nor through one with the name of a file that is about to be written."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "rounds").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        Checkpoints(folder)
    assert not list(elsewhere.iterdir())

    (elsewhere / "precious").write_text("precious")
    for name in ("file", "file.partial"):
        (tmp_path / name).symlink_to(elsewhere / "precious")
    write_whole(tmp_path / "file", b"new")
    assert (elsewhere / "precious").read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("run_id", ["..", "../../etc", "a/b", "/etc", "", "a" * 200])
def test_a_tracking_server_does_not_choose_the_folder_of_a_run(run_id):
    """Its ids of runs become names of folders."""
    with pytest.raises(CheckpointError, match="an id has letters"):
        run_folder.folder_of(run_id)


def test_a_description_is_no_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder.folder_of("abc").mkdir(parents=True)
    (tmp_path / "run.json").write_text("{}")
    (run_folder.folder_of("abc") / run_folder.DESCRIPTION).symlink_to(tmp_path / "run.json")

    with pytest.raises(CheckpointError, match="symbolic link"):
        run_folder.find("abc")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a\\..\\x", "..", "a\0"])
def test_artifacts_stay_under_their_run(name):
    """They are refused before a store is asked: nobody listens at this address."""
    run = TrackedRun(MlflowClient("http://127.0.0.1:1"), "http://127.0.0.1:1", "1")
    for write in (lambda: run.text(name, "x"), lambda: run.files(name, {"x": b""}), lambda: run.files("", {name: b""})):
        with pytest.raises(TrackingError, match="leads out of the run"):
            write()


def test_a_folder_of_data_holds_no_link_out_of_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.csv").write_text("text,label\na,b\n")
    (folder / "train.csv").symlink_to(tmp_path / "secret.csv")

    with pytest.raises(DataError, match="leads out of the folder"):
        load_rows(DataSection(source=str(folder)))
