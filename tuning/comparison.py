"""One experiment under several methods: what each gained, sent and cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.platform.rounds import Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run in a comparison.

    Attributes:
        accuracy_before: of the untrained model on the held-out split.
        accuracy_after: of the last round's model.
        bytes_up: sent by all clients over all rounds.
        bytes_down: received by all clients over all rounds.
        seconds: real seconds of all rounds.
        run_id: the MLflow run.
    """

    method: str
    accuracy_before: float
    accuracy_after: float
    bytes_up: int
    bytes_down: int
    seconds: float
    run_id: str


def outcome(method: str, rounds: Sequence[Round], run_id: str) -> Outcome:
    """Sum up a finished run; ``rounds`` starts with round 0."""
    trained = rounds[1:]
    return Outcome(
        method=method,
        accuracy_before=rounds[0].metrics["eval/accuracy"],
        accuracy_after=rounds[-1].metrics["eval/accuracy"],
        bytes_up=int(sum(done.metrics["bytes/up"] for done in trained)),
        bytes_down=int(sum(done.metrics["bytes/down"] for done in trained)),
        seconds=sum(done.metrics["seconds"] for done in trained),
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
