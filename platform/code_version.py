"""The git commit of the code that runs."""

import subprocess
from pathlib import Path

DESCRIBE = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]


def code_version() -> str | None:
    """Return the git commit of the checkout that this code runs from, marked ``-dirty`` if it was changed since."""
    here = Path(__file__).resolve()
    answers = []
    for question in (["ls-files", "--error-unmatch", here.name], DESCRIBE):
        command = ["git", "-C", str(here.parent), *question]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None  # no git, no checkout, or an installed package inside of somebody else's checkout
        answers.append(done.stdout.strip())
    return answers[-1]
