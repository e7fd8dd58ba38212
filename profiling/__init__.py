"""Measurements, ceilings, results and reports."""
