import gc

import pytest


@pytest.fixture
def only_new_objects():
    """Hide every object that exists from `gc`: to collect and to list those of a test runner takes a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
