"""Set up Triton's interpreter before anything imports triton, which decides on import whether kernels are interpreted."""

import gc
import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"

# Scopes that take long, the longest first: they begin first, so that the workers end together.
EXPORT = "tests/export"
LONG = (
    EXPORT,
    "tests/kernels/test_convolutions.py",
    "tests/test_contributing.py",
    "tests/zoo/training/test_parallel.py",
    "tests/zoo/training/test_interruptions.py",
    "tests/test_docs.py",
    "tests/zoo/training/test_ablation.py",
    "tests/test_packaging.py",
    "tests/test_examples.py",
    "tests/blocks/test_conformance.py",
    "tests/zoo/training/test_resume.py",
    "tests/zoo/test_models.py",
    "tests/zoo/tasks/test_tasks.py",
)


def scope(nodeid):
    """Return the file of a test. The tests that export are one scope, since a process reads torch's translations to ONNX once, and
    traces equal blocks once."""
    file = nodeid.split("::")[0]
    return EXPORT if file.startswith(f"{EXPORT}/") or file == "tests/zoo/test_wrong_inputs.py" or "train_export_run" in nodeid else file


def pytest_collection_finish():
    """Keep the garbage collector away from the modules that are imported now, and its long runs rare: they took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(700, 10, 100)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(scope(item.nodeid), len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run each scope in one worker, which builds its fixtures once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope(nodeid)

    config.option.loadscopereorder = False  # otherwise the scopes of most tests begin first
    return ByScope(config, log)
