"""What one run gained, sent and cost; and, for one experiment under several methods, what beats a trained head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run in a comparison.

    Attributes:
        accuracy_before: of the untrained model on the held-out split.
        accuracy_after: of the last round's model.
        loss_after: likewise.
        bytes_up: sent by all clients over all rounds.
        bytes_down: received by all clients over all rounds.
        sim_seconds: simulated seconds of all rounds; ``None`` where the experiment has no clock.
        seconds: real seconds of all rounds.
        run_id: the MLflow run.
    """

    method: str
    accuracy_before: float
    accuracy_after: float
    loss_after: float
    bytes_up: int
    bytes_down: int
    sim_seconds: float | None
    seconds: float
    run_id: str

    @property
    def bytes_total(self) -> int:
        """Both ways."""
        return self.bytes_up + self.bytes_down


def outcome(method: str, rounds: Sequence[Mapping[str, float]], run_id: str) -> Outcome:
    """Sum up a finished run from the metrics of its rounds, round 0 first."""
    trained = rounds[1:]
    return Outcome(
        method=method,
        accuracy_before=rounds[0]["eval/accuracy"],
        accuracy_after=rounds[-1]["eval/accuracy"],
        loss_after=rounds[-1]["eval/loss"],
        bytes_up=int(sum(metrics["bytes/up"] for metrics in trained)),
        bytes_down=int(sum(metrics["bytes/down"] for metrics in trained)),
        sim_seconds=rounds[-1].get("sim/seconds"),
        seconds=sum(metrics["seconds"] for metrics in trained),
        run_id=run_id,
    )


def verdict(outcomes: Sequence[Outcome], *, majority: float, head_only: float, test_examples: int) -> str:
    """Say in words which methods learnt more than a trained head, and which did not.

    A difference counts if it is beyond two standard errors of a difference of two accuracies measured on
    ``test_examples`` examples.
    """
    floor = max(majority, head_only)
    margin = 2 * (2 * floor * (1 - floor) / test_examples) ** 0.5
    above = [entry.method for entry in outcomes if entry.accuracy_after > floor + margin]
    below = [entry.method for entry in outcomes if entry.accuracy_after <= floor + margin]
    text = (
        f"Beyond noise (+{margin:.1%}) above both the majority class ({majority:.1%}) "
        f"and a trained head on the frozen base ({head_only:.1%}): {', '.join(above) or 'no method'}."
    )
    return f"{text} Not so: {', '.join(below)}." if below else text
