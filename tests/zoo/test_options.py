"""Options that several commands share."""

import os

import click
import pytest
import torch
from click.testing import CliRunner

from zoo.options import THREADS


@pytest.fixture
def as_before(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_threads_of_pytorch_here_and_in_workers(as_before):
    @click.command()
    @THREADS
    def command() -> None:
        print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])

    assert CliRunner().invoke(command, ["--threads", "3"]).output == "3 3\n"
    refused = CliRunner().invoke(command, ["--threads", "0"])
    assert (refused.exit_code, "0 is not in the range x>=1" in refused.output) == (2, True)
