"""Documents in Parquet files. Needs `pip install '.[integrations]'`."""

import json

import pytest
from click.testing import CliRunner

import zoo
from zoo.cli import main

pytestmark = pytest.mark.extended
TEXTS = [f"document {i}, où {'x' * (i % 7)}\n" for i in range(120)]


@pytest.fixture
def folder(tmp_path):
    """The same documents in both formats, in several row groups, and a model."""
    from pyarrow import parquet, table

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    columns = {"n": [*range(60), None, *range(60, 120)], "body": [*TEXTS[:60], None, *TEXTS[60:]]}
    parquet.write_table(table(columns), tmp_path / "rows.parquet", row_group_size=50)
    zoo.save(zoo.create("gdn4-sleep2-hard8", layers="gdn", d_model=16, d_ff=16, vocab_size=256), tmp_path / "model")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_tokens_are_those_of_the_same_rows_in_json(folder, recwarn):
    for kind in ("jsonl", "parquet"):
        done = run("tokenize", folder / f"rows.{kind}", "--out", folder / kind, "--field", "body", "--held-out", "0.2")
        assert done.exit_code == 0, done.output
    for name in ("train.npy", "test.npy", "data.yaml"):
        assert (folder / "parquet" / name).read_bytes() == (folder / "jsonl" / name).read_bytes()
    assert [str(one.message) for one in recwarn if one.category is UserWarning] == [
        f"{folder}/rows.parquet: 1 row with null under 'body' left out"
    ]


def test_a_model_is_evaluated_on_the_documents(folder):
    from pyarrow import parquet, table

    (folder / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    parquet.write_table(table({"text": TEXTS}), folder / "held.parquet")
    found = [run("eval", folder / "model", "--data", folder / f"held.{kind}", "--json") for kind in ("jsonl", "parquet")]
    assert found[1].exit_code == 0, found[1].output
    results = [json.loads(one.stdout) for one in found]
    assert results[0]["loss"] == results[1]["loss"] > 0
    assert results[0]["answers"] == results[1]["answers"]


def test_what_holds_no_text_is_refused_in_one_line(folder):
    (folder / "torn.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-9])
    for name, field, why in (
        ("rows", "text", "no column 'text'; allowed: body, n"),
        ("rows", "n", "row 1: no text under 'n'"),
        ("torn", "body", "cannot be read as Parquet"),
    ):
        done = run("tokenize", folder / f"{name}.parquet", "--out", folder / "out", "--field", field)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"{name}.parquet: {why}" in done.stderr
