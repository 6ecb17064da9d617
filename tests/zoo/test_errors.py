"""Parts of messages."""

import pytest

from zoo.errors import first_line


class WrappedError(Exception):
    inner_exception = KeyError("reason")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (RuntimeError("\n  after an empty line\n"), "RuntimeError: after an empty line"),
        (AssertionError(), "AssertionError"),
        (WrappedError("of no use"), "KeyError: 'reason'"),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line
