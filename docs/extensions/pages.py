"""Sphinx extension: the repository as a site. README carries the table of contents, and linked source files become pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx

CONTENTS = """
```{{toctree}}
:hidden:
:glob:
:caption: {caption}

{pages}
```
"""
SECTIONS = {
    "Guide": (
        "docs/guide",
        "docs/models",
        "docs/cli",
        "docs/sessions",
        "docs/training",
        "docs/integrations",
        "docs/reproduction",
        "docs/deploy",
        "docs/performance",
        "docs/gpu",
    ),
    "Inside": ("docs/architecture", "docs/glossary", "export/README", "kernels/*/README", "benchmarks/results/hotspots"),
    "Reference": ("docs/api/zoo", "docs/api/config", "docs/api/blocks", "docs/api/extending", "docs/api/export"),
    "Project": ("CONTRIBUTING", "AGENTS", "CHANGELOG", "SECURITY"),
}


def remember_links(app: Sphinx) -> None:
    """Keep the files and folders that pages link to in the environment, which is stored between builds."""
    if not hasattr(app.env, "linked"):
        app.env.linked = set()


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the site's table of contents to the README, where GitHub need not show it."""
    if docname == app.config.root_doc:
        for caption, pages in SECTIONS.items():
            source[0] += CONTENTS.format(caption=caption, pages="\n".join(f"/{page}" for page in pages))


def link_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Point links to files and folders of the repository at pages that show them."""
    for link in [*doctree.findall(download_reference), *doctree.findall(pending_xref)]:
        path = Path(app.srcdir, app.env.docname).parent.joinpath(link["reftarget"]).resolve()
        if link.get("reftype") != "myst" or link.get("refdomain") or not path.exists() or path == Path(app.srcdir):
            continue
        if path.is_dir() and (path / "README.md").is_file():
            link.update_all_atts({"refdomain": "doc", "reftarget": f"{path.relative_to(app.srcdir).as_posix()}/README"}, replace=True)
            link["reftargetid"] = None
            continue
        target = path.relative_to(app.srcdir).as_posix()
        app.env.linked.add(target)
        up = "../" * app.env.docname.count("/")
        link.replace_self(nodes.reference("", "", *link.children, internal=True, refuri=f"{up}source/{target}.html"))


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield a page for each linked file, and for each linked folder with the files in it."""
    linked = {Path(app.srcdir, name) for name in app.env.linked}
    inside = {
        folder: sorted(path for path in folder.iterdir() if path.is_file() and not is_binary(path)) for folder in linked if folder.is_dir()
    }
    for folder, files in inside.items():
        items = "".join(f'<li><a href="{folder.name}/{file.name}.html">{file.name}</a></li>' for file in files)
        yield page(app, folder, f"<ul>{items}</ul>")
    for file in linked.union(*inside.values()) - inside.keys():
        text = file.read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(file.name).aliases[0]
        except ClassNotFound:
            lexer = "text"
        yield page(app, file, app.builder.highlighter.highlight_block(text, lexer, linenos=True))


def is_binary(file: Path) -> bool:
    return b"\0" in file.read_bytes()


def page(app: Sphinx, path: Path, body: str) -> tuple[str, dict[str, Any], str]:
    name = path.relative_to(app.srcdir).as_posix()
    return f"source/{name}", {"title": name, "body": f"<h1>{name}</h1>{body}"}, "page.html"


def write_index(app: Sphinx, error: Exception | None) -> None:
    """Serve the README as the site's index."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", remember_links)
    app.connect("source-read", add_contents)
    app.connect("doctree-read", link_sources, priority=100)  # before Sphinx collects downloads
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", write_index)
    return {"version": "1", "parallel_read_safe": False}
