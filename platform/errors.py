"""Every error that a user can meet, and how it is worded.

    FedloomError
    ├── ExperimentError    the experiment file, a preset or ``--set``
    ├── DataError          a data source, its columns or its partition
    ├── ModelError         a base model, its tokenizer or its modules
    ├── MachineError       a machine that lacks what the experiment needs of it
    ├── RoundError         a round that cannot be finished
    ├── CheckpointError    a checkpoint or a file beside it that cannot be written, or gone on from
    ├── PublishedError     a file of published numbers
    └── AdapterError       an adapter whose names, shapes or numbers are wrong

A message names the place, the value, what is allowed and the nearest right answer.
"""

import difflib
from collections.abc import Iterable


class FedloomError(Exception):
    """The root: the command line prints it as one line and exits with 2, without a traceback."""


class ExperimentError(FedloomError):
    """The experiment cannot be run as written."""


class DataError(FedloomError):
    """The data cannot be read, mapped or partitioned as asked."""


class ModelError(FedloomError):
    """The base model cannot be loaded or adapted as asked."""


class MachineError(FedloomError):
    """A machine lacks a package, a compiler or a device that the experiment needs."""


class RoundError(FedloomError):
    """A round cannot be finished, e.g. too few updates arrived."""


class ServerLostError(RoundError):
    """The server of a run is gone; the run can go on from its last checkpoint."""


class GroupLostError(RoundError):
    """A process of the group that trains a client together is gone, or hangs; the group is then of no use."""


class CheckpointError(FedloomError):
    """A checkpoint cannot be written, or a run cannot go on from what is there."""


class PublishedError(FedloomError):
    """A file of published numbers cannot be read, or is not in their form."""


class AdapterError(FedloomError):
    """An adapter or payload has names, shapes or values that do not fit."""


def clipped(value: object, limit: int = 200) -> str:
    """Return a value for a message, whatever it is: cut to about ``limit`` characters, and fit for UTF-8."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """Word the message for a name that is not among the known ones."""
    names = sorted(known)
    return f"no {what} called {clipped(repr(word))}.{nearest(word, names)} Known: {', '.join(names)}."
