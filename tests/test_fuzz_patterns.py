"""Patterns of modules, of whatever text: those that are taken choose as PEFT does."""

import re

from hostile import tries
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from fedloom.platform.peft_patterns import check_patterns, chosen_by_pattern

ATOMS = st.sampled_from(
    [
        "a",
        "1",
        ".",
        r"\.",
        ".*",
        r"\d+",
        "[0-9]+",
        "[a-c]",
        "a+",
        "(",
        "(?:",
        ")",
        "|",
        "^",
        "$",
        "-",
        "+",
        "*",
        "?",
        "{9}",
    ]
)


@tries(300)
@given(
    patterns=st.lists(st.lists(ATOMS, min_size=1, max_size=7).map("".join), min_size=1, max_size=4, unique=True),
    modules=st.lists(st.text("a1.-", min_size=1, max_size=8), min_size=1, max_size=4, unique=True),
)
def test_what_is_allowed_is_chosen_as_peft_does(patterns, modules):
    """By the first pattern that matches; looking whole names up is no other choice. The rest is refused."""
    numbered = {pattern: number for number, pattern in enumerate(patterns)}
    try:
        chosen = chosen_by_pattern({"rank_pattern": numbered}, "rank_pattern", modules, None)
    except (ValueError, re.error):
        return
    assert not any(re.search(r"[)}][+*?{]", pattern) for pattern in patterns), "a repeated group"
    assert chosen == {module: numbered.get(get_pattern_key(patterns, module)) for module in modules}


@tries(100)
@given(
    names=st.lists(st.text("abz019_-", min_size=1, max_size=6), min_size=1, max_size=5).map(".".join),
    other=st.sampled_from(["q_proj", r"^model\.layers\.1", r"layers\.\d+\.mlp", ".*attn.*", "[0-3]"]),
)
def test_what_peft_and_this_library_write_is_allowed(names, other):
    """Names, escaped or not; for strings, alternatives that PEFT's combinations and tied embeddings put into groups."""
    exact = re.escape(names)
    for pattern in (names, exact, f"^{exact}", other):
        check_patterns({"rank_pattern": {pattern: 1}, "layers_pattern": pattern, "modules_to_save": [names]}, [names])
    for pattern in (f"{exact}|{other}", f"({names})|({other})", f"(?:{other}|^{exact}$)", "all-linear"):
        check_patterns({"target_modules": pattern, "exclude_modules": pattern}, [names])
    check_patterns({"target_modules": [names, "(a+)+$"]}, [names])  # compared as they are


def test_a_rank_of_its_own_for_every_module_of_a_large_model_is_read():
    """Ten thousand of them, as an adapter of a mixture of experts has, are looked up by their names."""
    modules = [f"model.layers.{i // 200}.mlp.experts.{i % 200}.down_proj" for i in range(10_000)]
    patterns = {f"^{re.escape(module)}": number for number, module in enumerate(modules)}

    assert list(chosen_by_pattern({"r": patterns}, "r", modules, 8).values()) == list(range(10_000))
