"""The reference pages, written from what they describe: every key of the schema, and every command of the program.

``python -m fedloom.jobs.reference docs/reference`` writes them; nothing in them is written by hand.
"""

import html
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from fedloom.jobs.catalogue import options
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_world import LARGEST_COUNT, LARGEST_NUMBER
from fedloom.platform.registry import method_class, method_names
from fedloom.tuning.sweep_file import Sweep

WRITTEN = "<!-- written by python -m fedloom.jobs.reference docs/reference -->"
WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "not empty",
    "maxLength": "at most {} characters",
    "minItems": "at least {} of them",
    "minProperties": "at least {} of them",
    "pattern": "`{}`",
}
CONFIGURATION = f"""{WRITTEN}

# Keys of an experiment and of a sweep

What a file may hold. Unknown keys are refused, and so are NaN and infinities; whole numbers end at {LARGEST_COUNT},
numbers at {LARGEST_NUMBER:g}, where no other bound is given. A key without a default must be there. `fedloom run FILE
--dry-run` prints an experiment with every default written out.

`population` also takes `preset` and `each`, which stand for a list of profiles
([published populations](../how-to/populations.md#published-populations)). Options of a controller:
[TSFA, and the other controllers](../methods/tsfa.md).
"""


def configuration() -> str:
    """Return the page of all keys: of an experiment, of the methods' own options, and of a sweep."""
    parts = [CONFIGURATION]
    for title, model in (("An experiment", Experiment), ("A sweep", Sweep)):
        parts += [f"## {title}\n", *_sections(model)]
    return "\n".join([*parts, "## Options of methods\n", _options()])


def _sections(root: type[BaseModel]) -> Iterator[str]:
    """Yield a table for every section of a schema, the root's first, then by the place where its keys stand."""
    schema = root.model_json_schema()
    defined = schema.get("$defs", {})
    waiting: list[tuple[str, type[BaseModel]]] = [("", root)]
    while waiting:
        place, model = waiting.pop(0)
        properties = (schema if model is root else defined[model.__name__])["properties"]
        if place:
            yield f"### `{place}`\n"
        yield f"{' '.join((inspect.getdoc(model) or '').split()).replace('``', '`')}\n"
        rows = [_row(key, properties[key], model, place) for key in model.model_fields]
        yield "\n".join(["| key | type | default | bounds | meaning |", "|---" * 5 + "|", *rows, ""])
        inner = [
            (_below(place, key, properties[key]), part)
            for key in model.model_fields
            for part in sections_in(model, key)
        ]
        waiting = inner + waiting


def _below(place: str, key: str, schema: Mapping[str, Any]) -> str:
    """Return where the keys of a section stand: ``[]`` for each of a list, ``.*`` for each of a mapping."""
    suffix = {"array": "[]", "object": ".*"}.get(schema.get("type", ""), "")
    return f"{place}.{key}{suffix}".removeprefix(".")


def sections_in(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """Return the sections that a key's type is made of."""
    found: dict[type[BaseModel], None] = {}
    waiting: list[Any] = [model.model_fields[key].annotation]
    while waiting:
        kind = waiting.pop(0)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[kind] = None
        waiting += get_args(kind)
    return list(found)


def _row(key: str, schema: Mapping[str, Any], model: type[BaseModel], place: str) -> str:
    field = model.model_fields[key]
    meaning = field.description or ""
    inner = sections_in(model, key)
    if not meaning and inner:
        meaning = (inspect.getdoc(inner[0]) or "").partition("\n")[0].rstrip(".").replace("``", "`")
    default = "" if field.is_required() else _default(field.default)
    cells = (f"`{key}`", _kind(schema), default, ", ".join(dict.fromkeys(_bounds(schema))), meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Any) -> str:
    """Return a default as it would stand in the file."""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        value = [
            each.model_dump(exclude_unset=bool(each.model_fields_set)) if isinstance(each, BaseModel) else each
            for each in value
        ]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _kind(schema: Mapping[str, Any]) -> str:
    """Word a type of JSON Schema."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "section"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {_kind(inner)}" if isinstance(inner, Mapping) and inner else "mapping"
    return WORDS.get(schema.get("type", ""), "anything")


def _bounds(schema: Mapping[str, Any]) -> list[str]:
    """Word the bounds of a type of JSON Schema and of what it is made of; those that all numbers have are left out."""
    own = [
        words.format(schema[name])
        for name, words in BOUNDS.items()
        if name in schema and schema[name] not in (LARGEST_COUNT, LARGEST_NUMBER)
    ]
    either = [bound for each in schema.get("anyOf", ()) for bound in _bounds(each)]
    members = [schema.get("items"), schema.get("additionalProperties")]
    return own + either + [f"each {bound}" for each in members if isinstance(each, Mapping) for bound in _bounds(each)]


def _options() -> str:
    rows = ["| method | option | default | meaning |", "|---" * 4 + "|"]
    for name in method_names():
        link = f"[{method_class(name).traits.title}](../methods/{name}.md)"
        rows += [f"| {link} | `{option}` | `{default}` | {meaning} |" for option, default, meaning in options(name)]
    return "\n".join([*rows, ""])


def commands(app: typer.Typer) -> str:
    """Return the page of all commands, as ``fedloom COMMAND --help`` tells them."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("fedloom", [], resilient_parsing=True)
    known = group.commands
    listed = [f"* [`fedloom {name}`](#fedloom-{name}): {command.help}" for name, command in known.items()]
    pages = [
        get_docs_for_click(obj=command, ctx=context, indent=1, call_prefix="fedloom") for command in known.values()
    ]
    text = "\n".join([WRITTEN, "", "# Commands", "", group.help, "", *listed, "", *pages])
    return html.unescape(text).replace("```console\n$ ", "```text\n").rstrip() + "\n"


def pages() -> dict[str, str]:
    """Return the text of each page by its file's name."""
    from fedloom.jobs.main import app

    return {"configuration.md": configuration(), "commands.md": commands(app)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
