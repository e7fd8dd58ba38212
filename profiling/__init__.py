"""Benchmarks, ceilings, reports and the command line."""
