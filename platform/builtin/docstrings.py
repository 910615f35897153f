"""The docstrings of the running Python's standard library, and the topics of its `help()`.

Sources are parsed and never imported, because some modules act when imported; the few that are written in C are listed
in `areas.COMPILED`.
"""

import ast
import functools
import importlib
import inspect
import sysconfig
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.platform.builtin.areas import AREA_OF, COMPILED, PUBLIC_NAME
from fedloom.platform.errors import DataError

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "idle_test", "_bundled"}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_COMPILED_KINDS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Docstring:
    """One docstring, where it stands and what it documents.

    `name` is fully qualified under the public module name, e.g. `pathlib.Path.exists`. `module` is the first part of
    it. `prompt` is the signature, named as within its module, e.g. `def Path.exists(self):`. `text` keeps its line
    breaks and is free of common indentation.
    """

    name: str
    module: str
    prompt: str
    text: str

    @property
    def words(self) -> str:
        """The text on one line: what decides whether two docstrings are the same."""
        return " ".join(self.text.split())


@functools.cache
def docstrings() -> tuple[Docstring, ...]:
    """Read the docstrings of every client, duplicates included: parsed sources by path, then compiled modules.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    folder = _stdlib_folder()
    if not (folder / "abc.py").is_file():
        raise DataError(
            f"builtin:stdlib reads the sources of the standard library, and {folder} has none. "
            "Use a Python that is installed with its .py files, or name another data source."
        )
    found: list[Docstring] = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and _public(parts[0]) in AREA_OF:
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.extend(parse(module, path.read_bytes()))
    for module in COMPILED:
        found.extend(_compiled(module))
    return tuple(found)


def help_topics() -> dict[str, str]:
    """Read the chapters of the language reference that `help("if")` shows; none where Python comes without them."""
    source = _stdlib_folder() / "pydoc_data" / "topics.py"
    if not source.is_file():
        return {}
    values = [
        node.value for node in ast.parse(source.read_bytes()).body if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    topics: dict[str, str] = next(ast.literal_eval(value) for value in values if isinstance(value, ast.Dict))
    return dict(sorted(topics.items()))


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _docstring(module: str, name: str, prompt: str, text: str) -> Docstring:
    public = _public(module)
    return Docstring(
        name=f"{public}.{name}" if name else public,
        module=public.partition(".")[0],
        prompt=prompt or f"module {public}:",
        text=text,
    )


def _public(module: str) -> str:
    first, *rest = module.split(".")
    return ".".join([PUBLIC_NAME.get(first, first), *rest])


def parse(module: str, source: bytes | str) -> Iterator[Docstring]:
    """Find the docstrings of one source file without running it; `module` is its dotted name."""
    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        yield _docstring(module, "", "", text)
    for name, node in _definitions(tree.body, ""):
        if text := ast.get_docstring(node):
            yield _docstring(module, name, _prompt(name, node), text)


def _definitions(body: Sequence[ast.AST], prefix: str) -> Iterator[tuple[str, _Definition]]:
    """Classes, methods and functions, also those under `if` and `try`; not what a function defines for itself."""
    for node in body:
        if isinstance(node, _Definition):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _definitions(list(ast.iter_child_nodes(node)), prefix)


def _prompt(name: str, node: _Definition) -> str:
    """Rebuild the signature on one line, as it would open the definition."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {name}({bases}):" if bases else f"class {name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {name}({ast.unparse(node.args)}){returns}:"


def _compiled(module_name: str) -> Iterator[Docstring]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return  # built without it, or another platform
    if module.__doc__:
        yield _docstring(module_name, "", "", inspect.cleandoc(module.__doc__))
    for name, member in sorted(vars(module).items()):
        if isinstance(member, type):
            if _public(member.__module__) == _public(module_name) and name == member.__name__:
                yield from _compiled_class(module_name, member)
        elif isinstance(member, types.BuiltinFunctionType) and not name.endswith("hook"):
            # Hooks are what programs replace: with them, the data would depend on who else runs in this process.
            yield from _compiled_member(module_name, name, member)


def _compiled_class(module_name: str, cls: type) -> Iterator[Docstring]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    prompt = f"class {cls.__name__}({bases}):" if bases else f"class {cls.__name__}:"
    if cls.__doc__:
        yield _docstring(module_name, cls.__name__, prompt, inspect.cleandoc(cls.__doc__))
    for name, member in sorted(vars(cls).items()):
        function = member.__func__ if isinstance(member, staticmethod) else member
        if isinstance(function, _COMPILED_KINDS):
            yield from _compiled_member(module_name, f"{cls.__name__}.{name}", function)


def _compiled_member(module_name: str, name: str, member: object) -> Iterator[Docstring]:
    signature = " ".join((getattr(member, "__text_signature__", None) or "(...)").split())
    for written, meant in (
        ("($module, /)", "()"),
        ("($module, /, ", "("),
        ("($module, ", "("),
        ("($module)", "()"),
        ("$", ""),
    ):
        signature = signature.replace(written, meant)
    text = member.__doc__
    if isinstance(text, str) and text:
        yield _docstring(module_name, name, f"def {name}{signature}:", inspect.cleandoc(text))
