import tests.kernels.interpreter  # noqa: F401  repairs the interpreter before any kernel is decorated
