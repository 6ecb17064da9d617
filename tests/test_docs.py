"""The documentation: links, completeness, and the site."""

import inspect
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import zoo
from docs.families import PAGE, page
from zoo.config import resolve, shipped
from zoo.registry import Registry

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


def test_every_field_of_a_plan_is_described():
    from zoo.training.plan import Plan

    section = (ROOT / "docs/cli.md").read_text(encoding="utf-8").partition("## zoo ablate\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == {"run", *Plan.model_fields}


def test_every_model_block_task_and_family_is_described():
    from zoo.blocks.mixer import mixers
    from zoo.checkpoints.family import families
    from zoo.tasks import tasks

    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    names = [*zoo.list_models(), *mixers.names(), *tasks.names(), *families.names()]
    assert [name for name in names if not re.search(rf"`{re.escape(name)}`", text)] == []


def test_every_recipe_is_in_the_table():
    section = (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("## Recipes\n")[2].partition("\n## ")[0]
    listed = {name for cell in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(.+?)`", cell)}
    runs = shipped("train")
    recipes = {name.removesuffix("-small").removesuffix("-h200") for name in runs}
    assert listed == recipes
    alone = re.findall(r"`(.+?)`", re.search(r"Each recipe except (.+?) has a variant", section)[1])
    assert set(alone) == {name for name in recipes if f"{name}-small" not in runs}
    assert {f"{name}-h200" for name in recipes} & set(runs) == {f"{name}-h200" for name in recipes - set(alone)}


def test_a_page_of_the_reference_links_to_the_code_that_fills_it():
    """Without the site, its directives show nothing."""
    for file in files("docs/api/*.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert "make docs" in text, file
        linked = {(ROOT / file.parent / link).resolve() for link in LINK.findall(text)}
        for target in re.findall(r"^```{fields} (.+)$", text, re.MULTILINE):
            module, _, name = target.rpartition(".")
            found = getattr(import_module(module), name)
            sources = found.names() if isinstance(found, Registry) else [found]
            for source in sources:
                path = Path(inspect.getfile(found.get(source) if isinstance(found, Registry) else source)).resolve()
                assert {path, path.parent} & linked, (target, source)


def test_the_families_are_not_stale():
    """`python -m docs.families` has been run since the last change of a config, an oracle or docs/families.yaml."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text


def test_the_families_have_the_published_costs():
    """Bytes of fast weights and of KV per token, by hand from the shapes: heads, N and P of each layer in float32, K and V in bfloat16."""
    cells = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.count("|") == 8]
    rows = {row[1].strip(" `"): [cell.strip() for cell in row] for row in cells if "`" in row[1]}
    assert sorted(rows) == zoo.list_models()
    fast = {"granite4-h-tiny": 36 * 48 * 128 * 64 * 4, "falcon-mamba-7b": 64 * 8192 * 16 * 4, "qwen3-next-80b-a3b": 36 * 32 * 128 * 128 * 4}
    fast["falcon-h1-7b"] = 44 * 24 * 256 * 128 * 4
    assert {name: rows[name][4] for name in fast} == {name: f"{number / 2**20:.3g} MiB" for name, number in fast.items()}
    cached = {"granite4-h-tiny": 4 * 2 * 4 * 128 * 2, "ouro1.4b": 4 * 24 * 2 * 16 * 128 * 2, "lfm2-1.2b": 6 * 2 * 8 * 64 * 2}
    cached["falcon-h1-7b"] = 44 * 2 * 2 * 128 * 2
    assert {name: rows[name][5] for name in cached} == {name: f"{number / 2**10:.3g} KiB" for name, number in cached.items()}
    assert (rows["falcon-mamba-7b"][5], rows["ouro1.4b"][4]) == ("none", "none")
    assert {name for name in rows if "Unconfirmed" in resolve(name).about} == {name for name in rows if rows[name][6]}


def test_every_oracle_is_named():
    text = PAGE.read_text(encoding="utf-8")
    assert [folder.name for folder in (ROOT / "tests/data/oracles").iterdir() if f"`{folder.name}`" not in text] == []


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
