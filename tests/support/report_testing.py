"""Results with all that commands now write: a committed one, and synthetic histograms beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hogstream.profiling.results.confidence import median_interval

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NAME = "amd-epyc-2-cores"


def committed(job: str) -> dict[str, Any]:
    """A committed result, such as of ``bench``, as it is."""
    result: dict[str, Any] = json.loads((RESULTS / f"{NAME}-{job}.json").read_text("utf-8"))
    return result


def old(job: str) -> dict[str, Any]:
    """A committed result without what commands did not write at first."""
    result = committed(job)
    if "ceilings" in result:
        for name in ("measured", "levels", "launches_per_second", "event_loop_turns_per_second"):
            result["ceilings"].pop(name, None)
    result.pop("warnings", None)
    for each in [*result["results"], *result.get("kernels", ())]:
        for name in [*each]:
            of_training = job == "train-digits" and name.endswith("_of_rounds")
            if name.endswith("_interval") or name == "share_of_ceilings" or of_training:
                del each[name]
        if "latency_us" in each:
            del each["latency_us"]["histogram"]
    for kernel in result.get("kernels", ()):
        del kernel["milliseconds_of_rounds"]
    return result


def full_bench(job: str = "bench", *, speed: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """A committed run of ``bench`` with ceilings of each level, histograms and intervals.

    Args:
        job: Which.
        speed: A factor on every round of lock-free, so that two runs differ by it.
        seed: Of the noise that is put on all rounds.
    """
    bench, random = committed(job), np.random.default_rng(seed)
    bench["ceilings"] |= {
        "measured": "2026-11-22T17:05:11+00:00",
        "levels": [
            {
                "level": level,
                "bytes": size,
                "threads": 2,
                "copy_gigabytes_per_second": _spread(0.6 * top, random),
                "update_shaped_gigabytes_per_second": _spread(top, random),
            }
            for level, size, top in (
                ("L1", 48 << 10, 310.0),
                ("L2", 1 << 20, 170.0),
                ("L3", 24 << 20, 88.0),
                ("memory", 320 << 20, 40.5),
            )
        ],
        "launches_per_second": _spread(412_000.0, random),
        "event_loop_turns_per_second": _spread(168_000.0, random),
    }
    for kernel in bench["kernels"]:
        spread = _spread(kernel["milliseconds"], random)
        kernel["milliseconds_of_rounds"] = spread["samples"]
        kernel["milliseconds_interval"] = spread["interval"]
    for result in bench["results"]:
        _fill(result, speed if result["policy"] == "lock-free" else 1.0, random)
    bench["warnings"] = [
        "locked at 2^16 elements with 8 workers: the interval is 41 % of the median wide, so "
        "nothing can be concluded from it."
    ]
    return bench


def _fill(result: dict[str, Any], speed: float, random: np.random.Generator) -> None:
    rounds = speed * np.asarray(result["updates_per_second_of_rounds"])
    rounds = rounds * np.exp(0.02 * random.standard_normal(len(rounds)))
    median, factor = float(np.median(rounds)), 1e-9 * 20 * result["elements"]
    interval = median_interval(list(rounds))
    result |= {
        "updates_per_second": median,
        "gigabytes_per_second": median * factor,
        "updates_per_second_of_rounds": rounds.tolist(),
        "updates_per_second_interval": [interval.low, interval.high],
        "gain_over_locked_interval": None,
        "gain_over_ordered_interval": None,
        "share_of_ceilings": {
            "level": "L2" if result["elements"] <= 1 << 16 else "L3",
            "bandwidth": min(0.98, median * factor / 88.0),
            "launch_rate": min(0.98, median / 412_000),
            "event_loop_rate": None,
        },
    }
    latency = result["latency_us"]
    sigma = np.log(latency["p99"] / latency["p50"]) / 2.33
    edges = np.geomspace(latency["p50"] / 20, latency["p99"] * 20, 61)
    samples = latency["p50"] * np.exp(sigma * random.standard_normal(20_000))
    counts, _ = np.histogram(samples, edges)
    latency["histogram"] = {"edges_us": edges.tolist(), "counts": counts.tolist()}


def _spread(median: float, random: np.random.Generator) -> dict[str, Any]:
    samples = (median * np.exp(0.03 * random.standard_normal(9))).tolist()
    interval = median_interval(samples)
    return {
        "median": interval.median,
        "interval": [interval.low, interval.high],
        "samples": samples,
    }
