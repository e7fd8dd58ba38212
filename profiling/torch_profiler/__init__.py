"""Torch's profiler: operations, lanes and workers on one clock."""
