"""What a measurement was made on: device, versions, cores, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hogstream.profiling.event_loop import EVENT_LOOP
from hogstream.profiling.results.records import Environment

_CPU_FOLDER = Path("/sys/devices/system/cpu")
_PACKAGES = ("hogstream", "torch", "triton", "numba", "numpy")


def describe_environment(device: torch.device, backend: str, processes: int = 1) -> Environment:
    """What a result says of where it was measured.

    Args:
        device: The device measured.
        backend: The backend measured.
        processes: How many the workers were spread over.
    """
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    return Environment(
        device=str(device),
        device_name=device_name(device),
        backend=backend,
        cores=usable_cores(),
        event_loop=EVENT_LOOP if processes == 1 else "asyncio",  # that of the others
        threads=torch.get_num_threads(),
        cuda_device_max_connections=connections if device.type == "cuda" else None,
        system=f"{platform.system()} {platform.machine()}",
        versions=_versions(),
        commit=source_commit(),
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a machine can do depends on this, and not on what it is busy with; as in JSON."""
    return {
        "host": platform.node(),
        "device_name": device_name(device),
        "processor": device_name(torch.device("cpu")),
        "cores": usable_cores(),
        "caches": [asdict(cache) for cache in caches(device)],
        "event_loop": EVENT_LOOP,
        "versions": _versions(),
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
    import psutil  # not all that measures needs it

    return int(psutil.virtual_memory().available)


def usable_cores() -> int:
    """How many CPU cores this process may run on."""
    return len(usable_core_numbers())


def usable_core_numbers() -> list[int]:
    """The CPU cores that this process may run on, by the system's numbers."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Cache:
    """Caches of one level.

    Attributes:
        level: Such as ``L2``.
        bytes: The size of one; of the smallest, if they differ.
        count: How many there are for the cores that this process may use.
    """

    level: str
    bytes: int
    count: int


def caches(device: torch.device) -> list[Cache]:
    """The caches of data that a device tells of, smallest first; of a GPU, that of the whole."""
    if device.type == "cuda":
        return [Cache("L2", torch.cuda.get_device_properties(device).L2_cache_size, 1)]
    sizes: dict[int, dict[str, int]] = {}  # of each level, by the cores that share it
    for level, cores, size in _read_caches():
        sizes.setdefault(level, {})[cores] = size
    return [
        Cache(f"L{level}", min(found.values()), len(found))
        for level, found in sorted(sizes.items())
    ]


def cache_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes of a core's own cache (L2) and of the last level; equal on a GPU, whose L2 is shared.

    Where the system does not say: 1 MiB and 32 MiB.
    """
    sizes = {cache.level: cache.bytes for cache in caches(device)}
    return sizes.get("L2", 1 << 20), list(sizes.values())[-1] if sizes else 32 << 20


def _read_caches() -> Iterator[tuple[int, str, int]]:
    """Level, cores and bytes of each cache of data of each usable core, as Linux tells."""
    for core in usable_core_numbers():
        for index in (_CPU_FOLDER / f"cpu{core}" / "cache").glob("index*"):
            try:
                kind, level, cores, size = (
                    (index / name).read_text().strip()
                    for name in ("type", "level", "shared_cpu_list", "size")
                )
                if kind != "Instruction":
                    yield int(level), cores, int(size.removesuffix("K")) << 10
            except (OSError, ValueError):
                continue  # some kernels leave sizes out


def _versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        **{package: installed_version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The commit of the source tree that runs, "-dirty" if changed since.

    The environment variable ``HOGSTREAM_COMMIT`` knows better than git, which does not know of what
    was copied over its tree. None if neither says.
    """
    if given := os.environ.get("HOGSTREAM_COMMIT"):
        return given
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
