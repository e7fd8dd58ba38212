"""What is measured: the scheduler, the optimizer beside others, training, kernels alone."""
