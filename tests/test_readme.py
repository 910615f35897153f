"""The README and the list of methods show what there is."""

import re

from documents import ROOT, blocks

from fedloom.jobs.demo import BASELINE, METHODS
from fedloom.platform.registry import method_class, method_names


def test_the_readme_shows_the_methods_of_the_demo():
    """Each stands there with its name in experiments and its paper; unequal ranks as it says."""
    text = (ROOT / "README.md").read_text()
    for name in METHODS:
        traits = method_class(name).traits
        row = re.search(rf"^\| .* \| `{name}` \| (\S+) \| (\w+) \|", text, flags=re.MULTILINE)
        assert row is not None
        assert row.groups() == (traits.paper, "yes" if traits.heterogeneous else "no")
    assert f"`{BASELINE}`" in text


def test_the_list_of_methods_is_complete():
    """Each registered method stands in the list with its name in experiments and its paper."""
    text = (ROOT / "docs" / "methods" / "README.md").read_text()
    for name in method_names():
        row = re.search(rf"^\| `{name}` \| .*$", text, flags=re.MULTILINE)
        assert row is not None, name
        assert method_class(name).traits.paper in row.group(), name


def test_the_readme_shows_folders_that_exist():
    """The short tree is the repository's."""
    trees = [
        block.text for block in blocks(ROOT / "README.md") if block.language == "text" and "platform/" in block.text
    ]
    folders = re.findall(r"^(\w+/)", trees[0], flags=re.MULTILINE)

    assert folders
    assert not [folder for folder in folders if not (ROOT / folder).is_dir()]
