"""One recorded run, read back into values that can be compared."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedloom.methods.algebra import singular_values
from fedloom.platform.errors import ExperimentError, FedloomError
from fedloom.platform.evaluation import ClientScore
from fedloom.platform.experiment_file import load_experiment
from fedloom.platform.peft_read import load_adapter
from fedloom.platform.reading import read_bounded
from fedloom.platform.tracked_run import flatten
from fedloom.platform.tracking_read import PARENT_TAG, Recorded, Records
from fedloom.tuning.comparison.outcome import Outcome, outcome

METRICS = ("eval/accuracy", "eval/loss", "bytes/up", "bytes/down", "bytes/total", "seconds", "sim/seconds")
PERSONAL = "personal/accuracy/"
MAX_FILE_BYTES = 2**26


class ComparisonError(FedloomError):
    """Runs cannot be compared as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation: after which round, and what was spent until then."""

    round: int
    bytes_total: float
    sim_seconds: float | None
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """A finished run.

    Attributes:
        parameters: the resolved experiment under dotted keys, lists of profiles spread out as well.
        fingerprint: of its data; empty if it was not recorded.
        code_version: of the checkout that ran it; empty outside a checkout.
        parent: the id of the run that it is a child of.
        points: its evaluations, the untrained model's first.
        clients: the final model on each scored client's own examples.
        personal: ``mean``, ``std`` and ``worst_decile`` over clients of the accuracy of a model that each has for
            itself; empty where there is a global model.
        spectra: by module, the singular values of scale * B A of the final global adapter, descending; empty if they
            were not asked for.
    """

    run_id: str
    name: str
    seed: int
    parameters: Mapping[str, str]
    fingerprint: str
    code_version: str
    parent: str | None
    outcome: Outcome
    points: tuple[Point, ...]
    clients: tuple[ClientScore, ...]
    personal: Mapping[str, float]
    spectra: Mapping[str, tuple[float, ...]]


def read_run(records: Records, recorded: Recorded, *, with_spectra: bool) -> ComparedRun:
    """Read a run; its spectra take a second or more where the adapter is a patch of hundreds of ranks.

    Raises:
        ComparisonError: it was not recorded by ``fedloom run``, or has not been evaluated.
        TrackingError: the store cannot be read.
    """
    parameters = _parameters(records, recorded)
    rounds = records.rounds(recorded.run_id, METRICS)
    if not rounds or any(not {"eval/accuracy", "eval/loss"} <= rounds[place].keys() for place in (0, -1)):
        raise ComparisonError(f"{shown(recorded)}: its first or last round has no evaluation")
    return ComparedRun(
        run_id=recorded.run_id,
        name=recorded.name,
        seed=int(parameters["seed"]),
        parameters=parameters,
        fingerprint=recorded.tags.get("data.fingerprint", ""),
        code_version=recorded.tags.get("code_version", ""),
        parent=recorded.tags.get(PARENT_TAG),
        outcome=outcome(parameters["method.name"], rounds, recorded.run_id),
        points=_points(rounds),
        clients=_clients(records, recorded),
        personal={
            name.removeprefix(PERSONAL): value for name, value in recorded.metrics.items() if name.startswith(PERSONAL)
        },
        spectra=_spectra(records, recorded) if with_spectra else {},
    )


def shown(recorded: Recorded) -> str:
    """Return how messages call a run."""
    return f"run {recorded.run_id[:8]} ({recorded.name})"


def _parameters(records: Records, recorded: Recorded) -> dict[str, str]:
    """Read the experiment from its file: a parameter's value in the store may be cut."""
    with records.artifact(recorded.run_id, "experiment.yaml") as path:
        if path is None:
            raise ComparisonError(
                f"{shown(recorded)}: has no experiment.yaml; only runs of experiments can be compared"
            )
        try:
            tree = load_experiment(path).model_dump(mode="json")
        except ExperimentError as error:
            raise ComparisonError(f"{shown(recorded)}: {error}") from error
    tree["population"]["profiles"] = {profile.pop("name"): profile for profile in tree["population"]["profiles"]}
    return flatten(tree)


def _points(rounds: list[dict[str, float]]) -> tuple[Point, ...]:
    """Return the evaluations; what a round does not say of costs is what was spent before it."""
    points = []
    spent = 0.0
    for number, metrics in enumerate(rounds):
        spent = metrics.get("bytes/total", spent)
        if "eval/accuracy" in metrics:
            accuracy = metrics["eval/accuracy"]
            sim_seconds = metrics.get("sim/seconds", 0.0 if number == 0 and "sim/seconds" in rounds[-1] else None)
            points.append(Point(round=number, bytes_total=spent, sim_seconds=sim_seconds, accuracy=accuracy))
    return tuple(points)


def _clients(records: Records, recorded: Recorded) -> tuple[ClientScore, ...]:
    with records.artifact(recorded.run_id, "clients.csv") as path:
        if path is None:
            return ()
        try:
            text = read_bounded(path, MAX_FILE_BYTES).decode()
            return tuple(
                ClientScore(
                    client=row["client"],
                    profile=row["profile"],
                    rank=int(row["rank"]),
                    num_examples=int(row["num_examples"]),
                    loss=float(row["loss"]),
                    accuracy=float(row["accuracy"]),
                )
                for row in csv.DictReader(text.splitlines())
            )
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise ComparisonError(f"{shown(recorded)}: clients.csv cannot be read: {error!r}") from error


def _spectra(records: Records, recorded: Recorded) -> dict[str, tuple[float, ...]]:
    with records.artifact(recorded.run_id, "adapters/final") as folder:
        return {} if folder is None else spectra_of(folder)


def spectra_of(folder: Path) -> dict[str, tuple[float, ...]]:
    """Return by module the singular values of scale * B A, those above rounding, without forming the product.

    Raises:
        AdapterError: the folder holds no such adapter.
    """
    adapter = load_adapter(folder)
    return {
        module: tuple((adapter.scale * singular_values(pair.B, pair.A)).tolist())
        for module, pair in adapter.factors.items()
    }
