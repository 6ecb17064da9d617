"""Plain English: phrases that no file may contain, and words that no public docstring may begin with."""

import ast
import re
import subprocess
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
# brackets keep the pattern from matching itself
FORBIDDEN = re.compile(r"\b(go(es)? on|leaves? of[f]|left of[f]|so man[y]|so muc[h]|is tol[d]|whateve[r]|nobod[y])\b")
FIRST = re.compile(r"(What|Whose|Whether|Of)\b")


def tracked(*patterns):
    names = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def public_docstrings(file):
    """Line and text of every docstring of a module, of its attributes, and of its public classes and functions."""

    def visit(node):
        for before, statement in pairwise([None, *node.body]):
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))) if before is None or isinstance(before, ast.Assign | ast.AnnAssign):
                    yield statement.lineno, text.strip()
            if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not statement.name.startswith("_"):
                yield from visit(statement)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")))


def test_no_forbidden_phrase():
    found = []
    for file in tracked(".", ":!tests/data", ":!tests/test_english.py"):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{file.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if FORBIDDEN.search(line)]
    assert not found, "\n".join(found)


def test_no_public_docstring_begins_with_a_question_word():
    files = [file for file in tracked("*.py") if file.relative_to(ROOT).parts[0] != "tests"]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for file in files
        for line, text in public_docstrings(file)
        if FIRST.match(text)
    ]
    assert not found, "\n".join(found)


def test_docstrings_are_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""What a module is."""\nx: int = 0\n"""Whether x."""\nclass A:\n    """Of A."""\n    y = 1\n    """Whose y."""\n'
        '    def f(self):\n        """What f is."""\n    def _g(self):\n        """What is private."""\n'
        'async def h():\n    """Whatever."""\n'
    )
    assert [text for _, text in public_docstrings(file) if FIRST.match(text)] == [
        "What a module is.", "Whether x.", "Of A.", "Whose y.", "What f is."
    ]  # fmt: skip
