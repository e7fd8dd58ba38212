"""What a measurement was made on: device, versions, cores, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from hogstream.profiling.event_loop import EVENT_LOOP

SCHEMA = 1  # of the JSON output of every command
_PACKAGES = ("hogstream", "torch", "triton", "numba", "numpy")


def describe_environment(device: torch.device, backend: str, processes: int = 1) -> dict[str, Any]:
    """The ``environment`` of the JSON output.

    Args:
        device: The device measured.
        backend: The backend measured.
        processes: How many the workers were spread over.
    """
    return {
        "device": str(device),
        "device_name": device_name(device),
        "backend": backend,
        "cores": usable_cores(),
        "event_loop": EVENT_LOOP if processes == 1 else "asyncio",  # that of the others
        "threads": torch.get_num_threads(),
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
        if device.type == "cuda"
        else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{package: installed_version(package) for package in _PACKAGES},
            "cuda": torch.version.cuda,
        },
        "cuda_device_max_connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        "commit": source_commit(),
    }


def best_device() -> torch.device:
    """CUDA if there is any, else the CPU."""
    return torch.device("cuda", 0) if cuda_devices() else torch.device("cpu")


def cuda_devices() -> int:
    """How many CUDA devices there are; ROCm's do not count, for which there are no lanes yet."""
    return 0 if torch.version.hip else torch.cuda.device_count()


def device_name(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes of a core's own cache (L2) and of the last level; equal on a GPU, whose L2 is shared.

    Where the system does not say: 1 MiB and 32 MiB.
    """
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
        return size, size
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            text = (index / "size").read_text().strip()
            sizes[int((index / "level").read_text())] = int(text.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue  # some kernels leave sizes out
    return sizes.get(2, 1 << 20), sizes[max(sizes)] if sizes else 32 << 20


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The commit of the source tree that runs, "-dirty" if changed since; None outside git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
