"""YAML as an experiment needs it, whatever a file holds: plain values, no aliases, bounded depth and size.

PyYAML takes about a kilobyte for every value, follows aliases that double at every step, and raises what it likes for
a value that its tag does not fit. Here the bounds are checked while the document is read, before it is built.
"""

from typing import Any

import yaml
from yaml.constructor import ConstructorError

MAX_TEXT_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_NUMBER_CHARACTERS = 64


def parse_yaml(text: str) -> Any:
    """Return what a document holds.

    Args:
        text: at most ``MAX_TEXT_BYTES`` characters; memory stays below 256 MiB then.

    Raises:
        yaml.YAMLError: it is no YAML, has a key twice, an alias, more than ``MAX_VALUES`` keys and values or
            ``MAX_DEPTH`` levels, or a number of more than ``MAX_NUMBER_CHARACTERS`` characters.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise yaml.YAMLError(f"it has {len(text)} characters; at most {MAX_TEXT_BYTES} are read")
    return yaml.load(text, Loader=_BoundedLoader)


class _BoundedLoader(yaml.SafeLoader):
    """Keeps the bounds. Also, YAML keeps the last of two equal keys in silence; an experiment must not."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._num_values += 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call] # so the stubs have it
        if self.check_event(yaml.AliasEvent):
            raise ConstructorError(None, None, "aliases (*name) are not read; write the value out", mark)
        if self._depth > MAX_DEPTH:
            raise ConstructorError(None, None, f"more than {MAX_DEPTH} levels are nested", mark)
        if self._num_values > MAX_VALUES:
            raise ConstructorError(None, None, f"there are more than {MAX_VALUES} keys and values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > MAX_NUMBER_CHARACTERS:
            problem = f"a number of {len(node.value)} characters; at most {MAX_NUMBER_CHARACTERS} are read"
            raise ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"this is no value of the type {kind!r}", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            self._refuse_doubled_keys(node)
        return super().construct_mapping(node, deep)

    def _refuse_doubled_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for part, _ in node.value:
            key = self.construct_object(part, deep=True)
            try:
                doubled = key in seen
            except TypeError as error:
                raise ConstructorError(None, None, "a list or a mapping cannot be a key", part.start_mark) from error
            if doubled:
                raise ConstructorError(None, None, f"the key {str(key)[:80]!r} stands twice", part.start_mark)
            seen.add(key)
