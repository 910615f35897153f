"""``fedloom aggregate``: adapters that anybody trained, merged by a method's mathematics, without a run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedloom.platform.adapter import Adapter, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.errors import AdapterError, ExperimentError, clipped
from fedloom.platform.experiment_file import method_with
from fedloom.platform.foreign_adapters import ForeignAdapter, check_alike, common_scale, look_at
from fedloom.platform.merging import Contribution, cuts, handed_out, merge_round, whole_model, why_not
from fedloom.platform.method import Method, State
from fedloom.platform.peft_format import check_place, put_in_place, whole_names, write_files
from fedloom.platform.peft_layout import Origin
from fedloom.platform.peft_read import MAX_WEIGHTS_BYTES
from fedloom.platform.registry import build_method, method_class, method_names

MOST_EXAMPLES = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to come of the adapters.

    Attributes:
        method: its name.
        overrides: its options, as ``option=value``.
        rank: the rank that is handed out; ``None`` for the whole model.
        per_client: whether each client gets a folder of its own, at its own ranks, instead of one for all.
    """

    method: str
    overrides: tuple[str, ...] = ()
    rank: int | None = None
    per_client: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What was written, in words, and what the user should know of it."""

    summary: str
    notes: tuple[str, ...]


def aggregate_folders(folders: Sequence[Path], examples: Sequence[int], output: Path, wanted: Wanted) -> Done:
    """Merge adapters in PEFT's format and write what comes of it, all of it or nothing.

    Raises:
        AdapterError: a folder is no adapter that can be merged, or does not fit the first; or the output is in use.
        ExperimentError: the method, an option or a number is wrong, or the method cannot merge such adapters.
    """
    method = _usable_method(wanted)
    _check_numbers(folders, examples, wanted)
    with _explained(output):
        check_place(output, replaces=())
    with _told_if_interrupted(output):
        adapters = [look_at(folder) for folder in folders]
        check_alike(adapters)
        _check_ranks(wanted.method, method, adapters)
        scale = common_scale(adapters)
        contributions = [
            _contribution(adapter, count, scale) for adapter, count in zip(adapters, examples, strict=True)
        ]
        state = merge_round(method, _template(adapters, scale, wanted), contributions)
        results = _results(method, state, contributions, wanted)
        _write(output, results, adapters[0].origin)
        return _told(output, results, adapters, sum(examples), wanted)


@contextlib.contextmanager
def _told_if_interrupted(output: Path) -> Iterator[None]:
    """Let Ctrl-C say what it leaves behind."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        written = output.is_dir() and any(output.iterdir())
        interrupt.add_note(f"{clipped(output)} is written as a whole" if written else "nothing was written")
        raise


def _usable_method(wanted: Wanted) -> Method:
    """Build the method, and see that it can merge what it has not sent out."""
    method = method_with(wanted.method, wanted.overrides, place="--method and --set")
    reason = why_not(method)
    if reason is not None:
        chosen = " ".join((wanted.method, *wanted.overrides))
        raise ExperimentError(
            f"--method {clipped(chosen)} cannot merge adapters that it did not send out: {reason}. "
            f"Methods that can: {_methods_that(lambda _: True)}."
        )
    return method


def _check_numbers(folders: Sequence[Path], examples: Sequence[int], wanted: Wanted) -> None:
    if len(examples) != len(folders):
        names = clipped(", ".join(map(str, folders)))
        raise ExperimentError(
            f"--examples has {len(examples)} numbers for {len(folders)} folders ({names}); give one for each, in the "
            "same order"
        )
    for folder, count in zip(folders, examples, strict=True):
        if not 1 <= count <= MOST_EXAMPLES:
            raise ExperimentError(f"--examples {clipped(count)} of {clipped(folder)}: allowed are 1 to {MOST_EXAMPLES}")
    _check_apart(folders, lambda folder: str(folder.resolve()), "are the same folder; each client counts once")
    if wanted.per_client:
        if wanted.rank is not None:
            raise ExperimentError("--rank is that of one result; it excludes --per-client, which takes each client's")
        _check_apart(folders, _own_name, "have the same name, and --per-client calls its folders by these names")


def _check_apart(folders: Sequence[Path], key: Callable[[Path], str], said: str) -> None:
    seen: dict[str, Path] = {}
    for folder in folders:
        other = seen.setdefault(key(folder), folder)
        if other is not folder:
            raise ExperimentError(f"{clipped(other)} and {clipped(folder)} {said}")


def _own_name(folder: Path) -> str:
    return folder.resolve().name


def _check_ranks(name: str, method: Method, adapters: Sequence[ForeignAdapter]) -> None:
    """Refuse unequal ranks where the method knows one."""
    first = adapters[0]
    for other in () if method.traits.heterogeneous else adapters[1:]:
        for module, rank in first.ranks.items():
            if other.ranks[module] != rank:
                raise ExperimentError(
                    f"--method {name} takes clients of one rank, but module {clipped(repr(module))} has rank {rank} in "
                    f"{clipped(first.folder)} and {other.ranks[module]} in {clipped(other.folder)}. "
                    f"Methods for unequal ranks: {_methods_that(lambda one: one.traits.heterogeneous)}."
                )


def _methods_that(have: Callable[[Method], bool]) -> str:
    """Name the methods that can merge what they have not sent out and, with their default options, ``have`` it."""
    built = {name: build_method(name, {}) for name in method_names()}
    return ", ".join(name for name, method in built.items() if why_not(method) is None and have(method))


def _contribution(adapter: ForeignAdapter, num_examples: int, scale: float) -> Contribution:
    return Contribution(
        name=str(adapter.folder), num_examples=num_examples, ranks=adapter.ranks, read=lambda: adapter.read(scale)
    )


def _template(adapters: Sequence[ForeignAdapter], scale: float, wanted: Wanted) -> Template:
    """Return the shapes of the server's adapter: every module at the largest rank of all.

    Raises:
        AdapterError: it would be larger than any adapter that is read.
    """
    first = adapters[0]
    rank = max(wanted.rank or 1, *(rank for adapter in adapters for rank in adapter.ranks.values()))
    size_bytes = 4 * rank * sum(map(sum, first.shapes.values()))
    if size_bytes > MAX_WEIGHTS_BYTES:
        raise AdapterError(
            f"an adapter of rank {rank}, the largest of all modules, clients and --rank, takes {size_bytes} bytes in "
            f"{len(first.shapes)} modules; at most {MAX_WEIGHTS_BYTES} are allowed"
        )
    head = {name: torch.zeros(tensor.shape) for name, tensor in first.head.items()}
    return Template(shapes=first.shapes, head=head, rank=rank, scale=scale)


def _results(method: Method, state: State, contributions: Sequence[Contribution], wanted: Wanted) -> dict[str, Adapter]:
    """Return what is written, by the name of its folder within the output; of one result the name is empty."""
    if wanted.per_client:
        return {
            _own_name(Path(each.name)): _cut(wanted.method, method, state, each.client, each.budget)
            for each in contributions
        }
    if wanted.rank is None:
        return {"": whole_model(method, state)}
    client = Client(id="result", profile="result", rank=wanted.rank, num_examples=1)
    return {"": _cut(wanted.method, method, state, client, Budget(rank=wanted.rank))}


def _cut(name: str, method: Method, state: State, client: Client, budget: Budget) -> Adapter:
    """Return what is handed out for a budget, if the method cuts its model to it or has no more."""
    adapter = handed_out(method, state, client, budget)
    for module, rank in adapter.ranks.items():
        most = budget.ranks.get(module, budget.rank)
        if rank > most:
            raise ExperimentError(
                f"--method {name}: the merged adapter has rank {rank} in module {clipped(repr(module))}, above "
                f"{most}, and this method hands out no smaller one. Methods that do: {_methods_that(cuts)}."
            )
    return adapter


def _write(output: Path, results: Mapping[str, Adapter], origin: Origin) -> None:
    with _explained(output), put_in_place(output, replaces=()) as beside:
        for name, adapter in results.items():
            (beside / name).mkdir(exist_ok=True)
            write_files(beside / name, adapter, origin, whole_names(adapter.factors), {})


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(f"{clipped(output)} cannot be written: {clipped(error)}") from error


def _told(
    output: Path, results: Mapping[str, Adapter], adapters: Sequence[ForeignAdapter], num_examples: int, wanted: Wanted
) -> Done:
    traits = method_class(wanted.method).traits
    lines = [
        f"{len(adapters)} adapters of {num_examples} examples, merged by {wanted.method} "
        f"(mean of the products: {traits.exact})"
    ]
    for name, adapter in results.items():
        ranks = sorted(set(adapter.ranks.values()))
        said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        lines.append(f"{output / name}: {len(adapter.factors)} modules, {said}, scale {adapter.scale:g}")
    first = adapters[0]
    notes = [
        f"{other.folder} names the base model {other.origin.base_model!r}, {first.folder} names "
        f"{first.origin.base_model!r}, and so does the result"
        for other in adapters[1:]
        if other.origin.base_model != first.origin.base_model
    ]
    return Done(summary="\n".join(lines), notes=tuple(map(clipped, notes)))
