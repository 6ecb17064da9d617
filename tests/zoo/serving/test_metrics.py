"""The metrics after some requests, and the dashboard that shows them."""

import json
import re
from pathlib import Path

import pytest

import zoo
from tests.zoo.serving.local import local
from zoo.text.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def metrics():
    """Names and labels with values, after two requests that begin with the same 40 tokens."""
    model = zoo.create("gdn4-sleep2-hard16", layers="gdn", d_model=16, d_ff=16, vocab_size=256)
    with local(model, ByteTokenizer(256)) as server:
        for _ in range(2):
            server.complete("x" * 40, max_tokens=4)
        lines = server.open("/metrics").read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics(metrics):
    assert metrics['zoo_tokens_total{kind="prompt"}'] == metrics['zoo_tokens_total{kind="cached"}'] == 40
    assert metrics['zoo_tokens_total{kind="completion"}'] == 8
    assert metrics["zoo_sleeps"] == 2  # after 16 and 32 tokens, once
    assert 0 < metrics["zoo_sleep_seconds"] < 60
    assert {name: value for name, value in metrics.items() if name.startswith("zoo_waiting")} == {
        f'zoo_waiting{{what="{what}"}}': 0 for what in ("prompt", "token", "sleep")
    }
    assert metrics["zoo_queue"] == 0
    assert metrics["zoo_prefixes_bytes"] > 0


def test_the_dashboard_shows_metrics_that_exist(metrics):
    """Every expression names one, and every metric is shown."""
    dashboard = json.loads((Path(__file__).parents[3] / "docs/grafana.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    shown = {name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(r"zoo_\w+", target["expr"])}
    known = {name.partition("{")[0] for name in metrics if not name.endswith("_created")}
    assert shown <= known
    assert {name.removesuffix("_count").removesuffix("_sum") for name in known if not re.search(r"_(bucket|created)(\{|$)", name)} <= {
        name.removesuffix("_bucket") for name in shown
    }
