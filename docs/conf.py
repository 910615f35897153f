"""The site: Sphinx reads the Markdown files as they stand in the repository, so that links mean the same in both.

Formulas become MathML when the pages are built: browsers show them without a script, and nothing comes from a network.
"""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

project = "Fedloom"
copyright = "The Fedloom authors"
root_doc = "docs/index"
extensions = ["myst_parser"]
include_patterns = ["docs/**.md", "docker/README.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "fedloom", "platform", "methods", "tuning", "jobs", "tests", "benchmarks", "build", "dist"]
templates_path = ["templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["formulas.css"]
html_title = "Fedloom"
html_additional_pages = {"index": "to_docs.html"}  # the pages lie in docs/, beside the README and docker/
html_copy_source = False
html_math_renderer = "mathml"


def _formula(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    mathml = convert(node.astext(), display=display)
    if "\\" in mathml or "<mi>&</mi>" in mathml:  # what the converter does not know is left as it is
        logging.getLogger(__name__).warning("formula that latex2mathml does not know: %s", mathml, location=node)
    self.body.append(mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Write formulas as MathML."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
