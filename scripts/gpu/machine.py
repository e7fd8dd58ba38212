"""Says what the machine is, in a file of JSON: its device, versions, and NVIDIA's tools."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import msgspec
import torch

from gpu.stages import NCU, NSYS, SANITIZER
from hogstream.profiling.environment import cuda_devices, describe_environment
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.nsight import tools

_TOOLS = {
    NSYS: tools.NSYS,
    NCU: tools.NCU,
    SANITIZER: tools.Tool(
        SANITIZER,
        "Compute Sanitizer",
        (2021, 1),  # the first that follows processes
        ("/usr/local/cuda*/bin/compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/*"),
        "",
    ),
}


def main() -> None:
    """Writes the file; exits with 1 if torch finds no device to use."""
    file, device = sys.argv[1:]
    if device == "cuda" and not cuda_devices():
        sys.exit("torch finds no CUDA device")
    where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    torch.ones(1, device=where)
    environment = describe_environment(where, "triton")
    said = {
        "environment": msgspec.to_builtins(environment),
        "name": re.sub(r"[^a-z0-9]+", "-", environment.device_name.lower()).strip("-"),
        "tools": {name: path_of(tool) for name, tool in _TOOLS.items()},
    }
    Path(file).write_text(json.dumps(said), encoding="utf-8")


def path_of(tool: tools.Tool) -> str | None:
    """Where a tool is; None if it is not here."""
    try:
        return tools.find_tool(tool).path
    except MeasurementError:
        return None


if __name__ == "__main__":
    main()
