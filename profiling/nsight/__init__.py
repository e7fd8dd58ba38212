"""NVIDIA's Nsight tools: their command lines, and what their reports say."""
