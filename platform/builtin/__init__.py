"""What Fedloom carries with it: `builtin:tiny`, a language model of 3 MB, and `builtin:stdlib`, data to adapt it to.

Both need no network. The data is the documentation of the Python that runs, so it is never stored in this repository;
the model lies in the folder `tiny` beside this file.
"""

from pathlib import Path

TINY_FOLDER = Path(__file__).resolve().parent / "tiny"
"""The Hugging Face folder of `builtin:tiny`."""
