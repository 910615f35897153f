"""The files of a trial: its lock, its rounds, and the checkpoint that another trial of a population takes over."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.rounds import Round
from fedloom.platform.run_folder import folder_of
from fedloom.platform.tracking_store import DEFAULT_FOLDER

ORIGIN = "origin.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The run and the round that a copied checkpoint comes from."""

    run_id: str
    round: int

    def write(self, folder: Path) -> None:
        """Put it beside the checkpoint."""
        (folder / ORIGIN).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "Origin":
        """Read it from beside the checkpoint."""
        return Origin(**json.loads((folder / ORIGIN).read_text(encoding="utf-8")))


def only_one(sweep: str, key: str) -> FileLock:
    """Return the lock that only one trial of a sweep holds for a key."""
    folder = Path(DEFAULT_FOLDER, "sweeps", sweep, "locks")
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / key)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Put the rounds, pieces and checkpoints of one folder in the place of another's."""
    for old in target.glob("checkpoint-*"):
        shutil.rmtree(old)
    for kind in ("rounds", "pieces"):
        shutil.copytree(source / kind, target / kind, dirs_exist_ok=True)
    for each in sorted(source.glob("checkpoint-*")):
        shutil.copytree(each, target / each.name)


def rounds_on_disk(run_id: str) -> list[Round]:
    """Return the rounds of a run from its last checkpoint."""
    with Checkpoints(folder_of(run_id)) as checkpoints:
        saved = checkpoints.load()
    return [] if saved is None else list(saved.rounds)
