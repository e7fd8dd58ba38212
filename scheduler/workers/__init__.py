"""Workers to run: simulated ones for benchmarks, and a model's forward and backward."""
