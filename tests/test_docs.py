"""The documentation: links, completeness, and the site."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import zoo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!\w+:)([^)\s]*)\)")


def files(*patterns):
    """Files of the repository, tracked or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return [Path(name) for name in names if name and (ROOT / name).exists()]


def prose(file):
    """A Markdown file without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / file).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(file):
    """The anchors that GitHub gives to a file's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(file, text):
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (ROOT / file.parent / path).resolve() if path else ROOT / file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield f"{file}: {link}"


def test_no_relative_link_is_dead():
    assert [dead for file in files("*.md") for dead in dead_links(file, prose(file))] == []


def test_dead_links_are_found():
    assert list(dead_links(Path("README.md"), "[a](docs/nowhere.md) [b](README.md#nowhere) [c](https://x.org) [d](README.md)")) == [
        "README.md: docs/nowhere.md",
        "README.md: README.md#nowhere",
    ]


def test_the_readme_is_short_and_shows_the_picture():
    assert len(README.split()) < 600
    assert "](docs/demo.png)" in README


def test_every_command_and_option_is_described():
    """And none that does not exist."""
    from zoo.cli import main
    from zoo.export.cli import main as export

    commands = {f"zoo {name}": command for name, command in main.commands.items()} | {"zoo-export": export}
    options = {
        name: {flag for p in command.params for flag in p.opts + p.secondary_opts if flag[0] == "-"} for name, command in commands.items()
    }
    sections = re.split(r"^## (.+)$", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    described = {
        name: {flag for cell in re.findall(r"^\| (`-.*?`) \|", text, re.MULTILINE) for flag in re.findall(r"`(--?[\w-]+)", cell)}
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    }
    assert described == options


def test_every_model_block_task_and_family_is_described():
    from zoo.blocks.mixer import mixers
    from zoo.checkpoints.family import families
    from zoo.tasks import tasks

    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    names = [*zoo.list_models(), *mixers.names(), *tasks.names(), *families.names()]
    assert [name for name in names if not re.search(rf"`{re.escape(name)}`", text)] == []


ARCHITECTURE = Path("docs/architecture.md")


def test_the_architecture_names_every_folder_and_every_top_file():
    text = (ROOT / ARCHITECTURE).read_text(encoding="utf-8")
    folders = {f"{folder}/" for file in files() for folder in file.parents if folder != Path(".")}
    folders = {re.sub(r"^(tests/data/oracles|zoo/weights)/.+", r"\1/*/", folder) for folder in folders}
    parents = {"configs/", "tests/data/", "tests/data/oracles/"}  # they hold folders only
    assert [folder for folder in sorted(folders - parents) if f"[`{folder}`](" not in text] == []
    assert [file.name for file in files() if len(file.parts) == 1 and f"](../{file})" not in text] == []


def test_the_architecture_names_what_is_in_the_linked_file():
    text = (ROOT / ARCHITECTURE).read_text(encoding="utf-8")
    named = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", text)
    assert len(named) > 30
    gone = [
        (name, file)
        for name, file in named
        for part in name.split(".")
        if not re.search(rf"^ *(async )?(def|class) {part}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert gone == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-t", "fast", "-c", "docs", ".", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


def test_the_first_page_shows_the_picture(site):
    picture = re.search(r'<img [^>]*src="([^"]*demo\.png)"', (site / "index.html").read_text(encoding="utf-8"))
    assert (site / picture[1]).is_file()


def test_the_reference_has_every_public_name(site):
    page = (site / "docs/api/zoo.html").read_text(encoding="utf-8")
    modules = {"export", "kernels"}
    assert [name for name in zoo.__all__ if name not in modules and f"zoo.{name}" not in page] == []


def test_the_reference_has_every_field(site):
    from zoo.blocks.mixer import mixers
    from zoo.tasks import tasks

    page = (site / "docs/api/config.html").read_text(encoding="utf-8")
    models = [zoo.ModelConfig, *(mixers.get(name).Options for name in mixers.names()), *(tasks.get(name) for name in tasks.names())]
    assert [field for model in models for field in model.model_fields if f">{field}<" not in page] == []


def test_every_page_is_in_the_site(site):
    pages = [file for file in files("docs/*.md", "kernels/*.md", "export/*.md") if "/_" not in str(file)]
    assert [str(page) for page in pages if not (site / page).with_suffix(".html").is_file()] == []


def test_the_citation_names_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
