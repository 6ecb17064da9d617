"""Set up Triton's interpreter before anything imports triton, which decides on import whether kernels are interpreted."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run each file in one worker, which builds its fixtures once, and all of tests/export in one, which share bundles."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return "tests/export" if file.startswith("tests/export/") else file

    return ByFile(config, log)
