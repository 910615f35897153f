"""``fedloom compare``: runs, sweeps or what a filter finds, as a table, an HTML report, CSV and LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from fedloom.jobs.compare_display import show
from fedloom.jobs.presets import reference_path
from fedloom.platform.errors import nearest
from fedloom.platform.tracking_read import FINISHED, PARENT_TAG, STOPPED_TAG, SWEEP_TAG, Recorded, Records
from fedloom.platform.whole_files import write_whole
from fedloom.tuning.comparison.reference import read_reference
from fedloom.tuning.comparison.report import html_report
from fedloom.tuning.comparison.runs import ComparisonError, read_run
from fedloom.tuning.comparison.summary import compare
from fedloom.tuning.comparison.tables import csv_table, latex_table

REPORT_FOLDER, REPORT_NAME = "report", "report.html"
SHOWN_DIGITS = 8  # of a run's id
MIN_DIGITS = 4  # of a run's id that a user may give for the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files to write; ``None`` for those that are not wanted."""

    html: Path | None = None
    csv: Path | None = None
    latex: Path | None = None


def compare_runs(
    given: Sequence[str],
    *,
    filter_string: str | None,
    reference: str | None,
    outputs: Outputs,
    attach: bool | None,
    tracking_uri: str | None,
) -> None:
    """Print the comparison, write the files, and attach the report to the runs' parent.

    Args:
        given: ids of runs or how they begin, names of sweeps or of experiments.
        filter_string: an MLflow filter; runs that it lets through are compared as well.
        reference: a YAML file of published numbers, or the name of a paper whose tables come along.
        outputs: files to write.
        attach: whether the parent gets the report; by default if every finished child of it is in the comparison.
        tracking_uri: of the store.

    Raises:
        ComparisonError: nothing is found, an argument is wrong, or a file cannot be written.
        TrackingError: the store cannot be read, or the report not be attached.
    """
    for path in (outputs.html, outputs.csv, outputs.latex):
        if path is not None and not path.parent.is_dir():
            raise ComparisonError(f"{path}: there is no folder {path.parent}. Make it, or name another file.")
    published = [] if reference is None else read_reference(reference_path(reference))
    records = Records(tracking_uri)
    chosen, notes = _finished(_chosen(records, given, filter_string))
    parent = _shared_parent(records, chosen, attach)
    with_spectra = parent is not None or outputs.html is not None or outputs.csv is not None
    errors = Console(stderr=True)
    reading = track(chosen, "reading runs", console=errors, transient=True, disable=not errors.is_terminal)
    runs = [read_run(records, run, with_spectra=with_spectra) for run in reading]
    comparison = compare(runs, published, notes)
    title = _title(given, filter_string)
    show(comparison, Console())
    page = html_report(comparison, title=title) if outputs.html or parent else b""
    _write(outputs.html, page)
    _write(outputs.csv, csv_table(comparison) if outputs.csv else b"")
    _write(outputs.latex, latex_table(comparison) if outputs.latex else b"")
    if parent is not None:
        records.attach(parent, REPORT_FOLDER, {REPORT_NAME: page})
        _say(f"The report is attached to the parent run {parent[:SHOWN_DIGITS]} as {REPORT_FOLDER}/{REPORT_NAME}.")


def _chosen(records: Records, given: Sequence[str], filter_string: str | None) -> list[Recorded]:
    """Return the runs that are meant, each once, parents replaced by their children, the oldest first in each."""
    if not given and filter_string is None:
        raise ComparisonError(f"name runs, sweeps or experiments, or give --filter. {_known(records)}")
    found: dict[str, Recorded] = {}
    for word in given:
        found |= {run.run_id: run for run in _meant(records, word)}
    if filter_string is not None:
        listed = records.runs(filter_string)
        if not listed:
            raise ComparisonError(f"--filter {filter_string!r}: lets no run through. {_known(records)}")
        found |= {run.run_id: run for run in listed}
    runs: dict[str, Recorded] = {}
    for run in found.values():
        children = records.runs(f"tags.`{PARENT_TAG}` = '{run.run_id}'")
        runs |= {each.run_id: each for each in children or [run]}
    return list(runs.values())


def _meant(records: Records, word: str) -> list[Recorded]:
    """Return the run whose id begins so, or the runs of the sweep or of the experiment of this name."""
    if re.fullmatch(rf"[0-9a-f]{{{MIN_DIGITS},32}}", word):
        runs = records.runs(f"attributes.run_id LIKE '{word}%'")
        if len(runs) > 1:
            listed = ", ".join(run.run_id[:SHOWN_DIGITS] for run in runs)
            raise ComparisonError(f"run {word!r}: {len(runs)} runs begin so ({listed}); give more digits")
        if runs:
            return runs
    if "'" not in word and word:  # it could not be quoted in a filter
        for place in (f"tags.`{SWEEP_TAG}`", "params.name"):
            runs = records.runs(f"{place} = '{word}'")
            if runs:
                return runs
    raise ComparisonError(
        f"{word!r}: no run's id begins so, and no sweep or experiment has this name.{_hint(records, word)}"
    )


def _names(records: Records) -> tuple[list[str], list[str]]:
    """Return the names of the sweeps and experiments on record, the latest first."""
    runs = records.runs()[::-1]
    sweeps = dict.fromkeys(run.tags[SWEEP_TAG] for run in runs if SWEEP_TAG in run.tags)
    experiments = dict.fromkeys(run.name.rpartition("/")[0] for run in runs if "/" in run.name)
    return list(sweeps), list(experiments)


def _known(records: Records) -> str:
    sweeps, experiments = _names(records)
    return f"Sweeps: {', '.join(sweeps[:8]) or 'none'}. Experiments: {', '.join(experiments[:8]) or 'none'}."


def _hint(records: Records, word: str) -> str:
    sweeps, experiments = _names(records)
    return f"{nearest(word, [*sweeps, *experiments])} {_known(records)}"


def _finished(runs: Sequence[Recorded]) -> tuple[list[Recorded], list[str]]:
    """Leave out the runs that have not played to their end, with a note on each."""
    reasons = {run.run_id: f"was stopped {run.tags[STOPPED_TAG]}" for run in runs if STOPPED_TAG in run.tags}
    reasons |= {run.run_id: f"is {run.status}" for run in runs if run.status != FINISHED}
    notes = [
        f"Run {run.run_id[:SHOWN_DIGITS]} ({run.name}) is left out: it {reasons[run.run_id]}."
        for run in runs
        if run.run_id in reasons
    ]
    finished = [run for run in runs if run.run_id not in reasons]
    if not finished:
        raise ComparisonError(" ".join(["there is no finished run to compare.", *notes]))
    return finished, notes


def _shared_parent(records: Records, runs: Sequence[Recorded], attach: bool | None) -> str | None:
    """Return the parent that gets the report; nobody by default if the comparison leaves a finished child out."""
    if attach is False:
        return None
    parents = {run.tags.get(PARENT_TAG) for run in runs}
    parent = parents.pop() if len(parents) == 1 else None
    if parent is None:
        if attach:
            raise ComparisonError("--attach: the runs do not share one parent; --html writes the report to a file")
        return None
    children = records.runs(f"tags.`{PARENT_TAG}` = '{parent}' AND attributes.status = '{FINISHED}'")
    whole = sum(STOPPED_TAG not in child.tags for child in children) == len(runs)
    return parent if attach or whole else None


def _title(given: Sequence[str], filter_string: str | None) -> str:
    words = [word[:SHOWN_DIGITS] if re.fullmatch(r"[0-9a-f]{32}", word) else word for word in given]
    return ", ".join([*words, *([filter_string] if filter_string else [])])


def _write(path: Path | None, content: bytes) -> None:
    if path is None:
        return
    try:
        write_whole(path, content)
    except OSError as error:
        raise ComparisonError(f"{path}: cannot be written: {error.strerror or error}") from error
    _say(f"Written to {path}.")


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
