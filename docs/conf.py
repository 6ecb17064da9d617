"""Sphinx configuration of the documentation site.

`make docs` builds it from the repository's Markdown files, wherever they are, and from the docstrings of `zoo`. README is the first page.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

project = "Sleep Zoo"
copyright = "the Sleep Zoo maintainers"
version = release = version_of("sleep-zoo")
html_title = f"{project} {version}"
html_theme = "furo"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
extensions += ["extensions.docstrings", "extensions.fields", "extensions.pages"]
if not tags.has("fast"):  # noqa: F821  (Sphinx defines `tags`; `-t fast` omits the pages of source code)
    extensions.append("sphinx.ext.viewcode")
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "export/**.md", "kernels/**.md", "benchmarks/**.md"]
exclude_patterns = ["build", "runs", "demo", "tests", "zoo", ".*"]

myst_heading_anchors = 3
default_role = "py:obj"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
toc_object_entries_show_parents = "hide"
