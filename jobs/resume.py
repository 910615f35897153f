"""``fedloom resume``: the same run once more, from its last checkpoint."""

from collections.abc import Sequence

from rich.console import Console

from fedloom.jobs.runs import execute, open_executor
from fedloom.platform.errors import DataError
from fedloom.platform.preparation import Prepared, prepare
from fedloom.platform.run_folder import Description, described_experiment, find, store_of, versions
from fedloom.platform.tracking import Tracking


def resume_run(
    run: str,
    overrides: Sequence[str],
    *,
    allow_changes: bool,
    local: bool,
    address: str | None,
    tracking_uri: str | None,
) -> None:
    """Go on with the run whose id begins with ``run``.

    Raises:
        CheckpointError: there is no such run, or it goes on already.
        ExperimentError: the experiment would change and may not.
        DataError: likewise the data.
    """
    description = find(run)
    prepared = prepare(described_experiment(description, overrides, allow_changes=allow_changes))
    _check_data(description, prepared, allow_changes=allow_changes)
    uri = store_of(description, tracking_uri)
    changed = {name: (was, now) for name, now in versions().items() if (was := description.versions.get(name)) != now}
    for name, (was, now) in changed.items():
        Console(stderr=True).print(
            f"warning: the run was started with {name} {was} and goes on with {now}; bits may differ", highlight=False
        )
    with open_executor(prepared.experiment, prepared, local=local, address=address) as executor:
        execute(prepared.experiment, prepared, executor, Tracking(uri), resume=description.run_id)


def _check_data(description: Description, prepared: Prepared, *, allow_changes: bool) -> None:
    now = prepared.data.fingerprint
    if now != description.fingerprint and not allow_changes:
        raise DataError(
            f"key data.source: the data have the fingerprint {now}, but the run was started on "
            f"{description.fingerprint}. Put the data back, or give --allow-changes."
        )
