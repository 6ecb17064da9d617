"""Set up Triton's interpreter before anything imports triton, which decides on import whether kernels are interpreted."""

import os

os.environ["TRITON_INTERPRET"] = "1"
