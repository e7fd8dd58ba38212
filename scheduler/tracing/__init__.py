"""What a run shows of itself: NVTX ranges for a profiler, and a timeline."""
