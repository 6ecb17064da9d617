from zoo.kernels.dispatch import use as use
