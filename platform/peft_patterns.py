r"""The patterns of an adapter's configuration: regular expressions that others wrote, so they are bounded first.

PEFT puts them between ``(.*\.)?(`` and ``)$`` and asks Python's matcher, which goes back over a name as often as a
pattern lets it: ``(a+)+$`` never ends on forty letters. Allowed is what needs no more than a known number of steps:
names, alternatives of names, and a few ``.*`` and ``[0-9]+`` in them.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from fedloom.platform.errors import clipped

MAX_PATTERNS = 4096  # a tenth of a millisecond each to compile
MAX_WILDCARDS = 4
MAX_STEPS = 2**28  # of matching one key's patterns against all modules; at most 15 ns each
STEPS_OF_A_MATCH = 64  # what one costs that fails on the first letter

# Nothing is repeated but single characters, and no group follows a group: a branch is a row of characters. The
# possessive ++ and *+ keep this check itself from going back.
CLASS = r"(?:\.|\\[dw]|\[[\w-]++\])"
WILDCARD = rf"{CLASS}[*+]\??"
BRANCH = rf"(?:\((?:\?:)?)*+\^?(?:{WILDCARD}|{CLASS}|\\[.-]|[\w-])++\$?\)*+"
ALLOWED = re.compile(rf"{BRANCH}(?:\|{BRANCH})*+")
WHOLE_NAME = re.compile(r"\^((?:\w|\\[.-]|-)++)")  # matches one name and no other
KEYS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern", "modules_to_save")


def chosen_by_pattern(config: Mapping[str, Any], key: str, modules: Collection[str], default: Any) -> dict[str, Any]:
    """Return the value of each module as PEFT chooses it: by the first pattern that matches, else ``default``.

    A pattern matches a module whose name is, or ends after a dot with, what it describes.

    Raises:
        TypeError: ``config[key]`` is no mapping.
        ValueError: a pattern is not allowed, or matching them takes more than ``MAX_STEPS``.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise TypeError(f"{key} is {patterns!r}, not a mapping")
    # Whole names are looked up: a model with thousands of modules may have a rank of its own for each.
    whole = {re.sub(r"\\(.)", r"\1", pattern[1:]): pattern for pattern in patterns if WHOLE_NAME.fullmatch(pattern)}
    named = set(whole.values())
    others = [pattern for pattern in patterns if pattern not in named]
    _check(key, others, modules)
    places = {pattern: place for place, pattern in enumerate(patterns)}
    compiled = [(places[pattern], re.compile(rf"(.*\.)?({pattern})$")) for pattern in others]
    values = [*patterns.values(), default]
    chosen = {}
    for module in modules:
        first = places[whole[module]] if module in whole else len(patterns)
        matching = (place for place, pattern in compiled if place < first and pattern.match(module))
        chosen[module] = values[next(matching, first)]
    return chosen


def check_patterns(config: Mapping[str, Any], modules: Collection[str]) -> None:
    """Check all that PEFT takes for a regular expression, before it matches them against a model's modules.

    Raises:
        TypeError: there is something else than strings where patterns belong.
        ValueError: as :func:`chosen_by_pattern`.
    """
    for key in KEYS:
        given = config.get(key) or ()
        patterns = [given] if isinstance(given, str) else given
        if not isinstance(patterns, list | tuple | dict) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"{key} is {given!r}, not patterns")
        # The entries of these two are compared, and only a string is a pattern.
        if isinstance(given, str) or key not in ("target_modules", "exclude_modules"):
            _check(key, patterns, modules)


def _check(key: str, patterns: Collection[str], modules: Collection[str]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"{key} has {len(patterns)} patterns; at most {MAX_PATTERNS} are read")
    characters = dict.fromkeys(range(MAX_WILDCARDS + 1), 0)  # of all patterns with so many wildcards
    for pattern in patterns:
        wildcards = len(re.findall(WILDCARD, pattern))
        if not ALLOWED.fullmatch(pattern) or wildcards > MAX_WILDCARDS:
            raise ValueError(
                f"{key} has the pattern {clipped(repr(pattern))}; allowed are names of modules, e.g. 'q_proj' "
                rf"or '^model\.layers\.0', alternatives of them (a|b), at most {MAX_WILDCARDS} of .*, \d+ and [0-9]+"
            )
        characters[wildcards] += len(pattern)
    steps = sum(_steps(len(patterns), characters, module) for module in modules)
    if steps > MAX_STEPS:
        raise ValueError(
            f"{key}: matching {len(patterns)} patterns with {len(modules)} modules may take {steps:.3g} steps; at most "
            f"{MAX_STEPS} are made. Name modules in full, with fewer wildcards"
        )


def _steps(num_patterns: int, characters: dict[int, int], module: str) -> int:
    """Return how many characters are compared at most: a start after every dot, any cut of the name by wildcards."""
    compared: int = sum(count * (len(module) + 1) ** wildcards for wildcards, count in characters.items())
    return num_patterns * (STEPS_OF_A_MATCH + len(module)) + (module.count(".") + 1) * compared
