"""The model card of `builtin:tiny`."""

from collections.abc import Mapping

_TEMPLATE = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny

A Llama of {parameters} parameters that has read nothing but the documentation of Python. It exists so that Fedloom can
be tried and tested in seconds, without a network: it is a base to put adapters on, not a model to talk to.

* **Shape:** 4 layers, hidden size 160, 5 heads, byte-level BPE of 2,048 entries, 512 positions, tied embeddings. The
  weights are stored as bfloat16 and loaded as float32.
* **Text:** the docstrings of Python's standard library and the topics of `help()`, both of the Python named below. They
  are under the PSF licence; the text itself is not part of this folder.
* **Held back:** every docstring whose example is in the test split of `builtin:stdlib`, and every docstring whose own
  name falls into that split, were in neither the training text nor the tokenizer's. The split goes by the hash of a
  name, so it is the same for other versions of Python; only a text that moved to another name may have been seen.
* **Limits:** English technical prose of one kind. It repeats itself, knows no facts and follows no instruction.

| measured | |
|---|---|
{table}
"""


def model_card(facts: Mapping[str, object]) -> str:
    """Write the README of a model folder: `facts`, `parameters` among them, become a table in their order."""
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in facts.items())
    return _TEMPLATE.format(parameters=_shown(facts["parameters"]), table=table)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
