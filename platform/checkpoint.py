"""What a run needs to go on after it was cut, on disk: safetensors and JSON, checksummed, renamed into place.

::

    FOLDER/run.json                       the experiment, where it is tracked, what it was trained on
    FOLDER/rounds/000003.json             one finished round: metrics and every client's record
    FOLDER/pieces/000002.safetensors      one piece of the patch, for methods that merge into the base
    FOLDER/checkpoint-000003/             the state after round 3:
        state.safetensors                     the method's tensors
        progress.json                         its JSON, the world's and the driver's
        manifest.json                         the SHA-256 of every file above that belongs to it

A checkpoint is written as ``checkpoint-000003.partial`` and renamed, so that it is there as a whole or not at all.
Rounds and pieces do not change once they are made and are shared by all later checkpoints.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from filelock import FileLock, Timeout

from fedloom.platform.errors import CheckpointError, FedloomError
from fedloom.platform.reading import inside
from fedloom.platform.rounds import Round, round_from_json, round_to_json
from fedloom.platform.sent import Snapshot
from fedloom.platform.whole_files import PARTIAL, explained, sync_folder, write_synced, write_whole
from fedloom.platform.wire import Packet, pack, unpack

NAME = re.compile(r"checkpoint-(\d{6})")
SHARED = re.compile(r"rounds/\d{6}\.json|pieces/\d{6}\.safetensors")
OWN = {"state.safetensors", "progress.json"}
# What a damaged file raises when it is read.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    FedloomError,
    safetensors.SafetensorError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        rounds: all finished rounds, round 0 first.
        snapshot: the server's.
        progress: JSON values of the driver and the world.
    """

    rounds: Sequence[Round]
    snapshot: Snapshot
    progress: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run. Only one process at a time may hold them.

    Attributes:
        folder: where they lie.
        notes: what :meth:`load` has passed over, in words.
        num_restored: how many rounds it has found, round 0 included.
    """

    def __init__(self, folder: Path, *, every: int = 1, keep: int = 2) -> None:
        """Open the folder, or make it; ``every``: rounds between checkpoints, ``keep``: how many are kept.

        Raises:
            CheckpointError: another process holds it, or it cannot be made.
        """
        self.folder = folder
        self.notes: list[str] = []
        self.num_restored = 0
        self._every = every
        self._keep = keep
        self._sums: dict[str, str] = {}  # of rounds and pieces
        self._num_pieces = 0
        with explained(folder):
            for name in ("rounds", "pieces"):
                inside(folder, name).mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock", blocking=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise CheckpointError(f"{folder}: this run is going on in another process") from error

    def __enter__(self) -> Self:
        """Hold the folder."""
        return self

    def __exit__(self, *reason: object) -> None:
        """Let the folder go."""
        self._lock.release()

    @property
    def num_pieces(self) -> int:
        """The number of pieces of the patch that are on disk already."""
        return self._num_pieces

    def due(self, number: int, last: int) -> bool:
        """Whether a checkpoint is to be made after round ``number`` of ``last``."""
        return number % self._every == 0 or number == last

    def add(self, done: Round) -> None:
        """Write a finished round; it counts once a checkpoint names it."""
        self._write_shared(f"rounds/{done.number:06d}.json", _json(round_to_json(done)))

    def save(self, number: int, snapshot: Snapshot, progress: Mapping[str, Any]) -> None:
        """Write the checkpoint after round ``number``, then remove those that are not kept.

        Args:
            number: the round.
            snapshot: of the server, with the pieces from :attr:`num_pieces` on.
            progress: JSON values.

        Raises:
            CheckpointError: the disk is full or not writable; what was there before stays.
        """
        for piece in snapshot.pieces:
            name = f"pieces/{self._num_pieces:06d}.safetensors"
            self._write_shared(name, safetensors.torch.save(_contiguous(piece)))
            self._num_pieces += 1
        files = {
            "state.safetensors": safetensors.torch.save(_contiguous(snapshot.state)),
            "progress.json": _json({"round": number, "server": snapshot.state.meta, **progress}),
        }
        sums = {name: _sum(content) for name, content in files.items()}
        files["manifest.json"] = _json({"round": number, "own": sums, "shared": self._sums})
        final = self.folder / f"checkpoint-{number:06d}"
        partial = final.with_name(final.name + PARTIAL)
        with explained(final):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                for name, content in files.items():
                    write_synced(partial / name, content)
                shutil.rmtree(final, ignore_errors=True)  # a damaged one, or one that a change has overtaken
                os.rename(partial, final)
                sync_folder(self.folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        for old in self._found()[self._keep :]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def load(self) -> Saved | None:
        """Return the newest whole checkpoint, or ``None`` without one; ``notes`` names those that were passed over."""
        for number in self._found():
            try:
                return self._read(number)
            except UNREADABLE as error:
                self.notes.append(f"{self._path(number)} is damaged and passed over: {error}")
        self._sums, self._num_pieces = {}, 0
        return None

    def _read(self, number: int) -> Saved:
        folder = self._path(number)
        manifest = json.loads(inside(self.folder, f"{folder.name}/manifest.json").read_bytes())
        strangers = [name for name in manifest["shared"] if not SHARED.fullmatch(name)]
        if strangers or set(manifest["own"]) != OWN:
            raise CheckpointError(
                f"manifest.json names files that no checkpoint has, e.g. {strangers or manifest['own']}"
            )
        own = {name: self._checked(f"{folder.name}/{name}", wanted) for name, wanted in manifest["own"].items()}
        shared = {name: self._checked(name, wanted) for name, wanted in manifest["shared"].items()}
        progress = json.loads(own["progress.json"])
        pieces = [shared[name] for name in sorted(shared) if name.startswith("pieces/")]
        state = pack(safetensors.torch.load(own["state.safetensors"]), progress.pop("server"))
        rounds = [round_from_json(json.loads(shared[name])) for name in sorted(shared) if name.startswith("rounds/")]
        if [done.number for done in rounds] != list(range(number + 1)):
            raise CheckpointError("rounds are missing")
        self._sums, self._num_pieces, self.num_restored = dict(manifest["shared"]), len(pieces), len(rounds)
        return Saved(
            rounds=rounds,
            snapshot=Snapshot(state=state, pieces=tuple(pack(safetensors.torch.load(piece)) for piece in pieces)),
            progress=progress,
        )

    def _checked(self, name: str, wanted: str) -> bytes:
        content = inside(self.folder, name).read_bytes()
        if _sum(content) != wanted:
            raise CheckpointError(f"{name} does not have the contents that were written")
        return content

    def _found(self) -> list[int]:
        """Return the rounds of the checkpoints that are there, newest first."""
        matches = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"checkpoint-{number:06d}"

    def _write_shared(self, name: str, content: bytes) -> None:
        write_whole(inside(self.folder, name), content)
        self._sums[name] = _sum(content)


def _contiguous(packet: Packet) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in unpack(packet).items()}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
