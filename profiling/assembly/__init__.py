"""Kernels compiled ahead of time, and what their assembly does."""
