"""Before anything imports triton: its decorators and its own library decide then whether kernels are interpreted."""

import os

os.environ["TRITON_INTERPRET"] = "1"
