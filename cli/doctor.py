"""``hogstream doctor``."""

from __future__ import annotations

import click
import torch

from hogstream.cli.console import new_table, print_table
from hogstream.kernels import available_backends, rmsprop_
from hogstream.kernels.backends.select import select_backend
from hogstream.profiling.ceilings.machine import machine_ceilings
from hogstream.profiling.environment import cuda_devices, device_name, installed_version
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.nsight.tools import NCU, NSYS, find_tool
from hogstream.profiling.results.records import Ceilings
from hogstream.profiling.wording import counted, number_text
from hogstream.scheduler.thread_state import share_of_cores
from hogstream.scheduler.tracing.nvtx import why_no_ranges

_OPTIONAL = (
    *("triton", "numba", "click", "rich", "matplotlib", "jinja2", "msgspec", "scikit-learn"),
    *("uvloop", "nvtx"),
)
WORKS = "works"


@click.command()
def doctor() -> None:
    """Say what is installed and what works here.

    What does not work is listed with the reason.
    """
    for title, rows in (
        ("Installed", installed_packages()),
        ("Devices", check_devices()),
        ("Threads", check_threads()),
        ("Backends", check_backends()),
        ("Profilers", check_profilers()),
    ):
        table = new_table(title, "", "", text_columns=2)
        for name, text in rows.items():
            table.add_row(name, text)
        print_table(table)
    table = new_table("Bandwidth", "device", "copy GB/s", "update-shaped GB/s", "measured")
    for name, ceilings in ceilings_of_devices().items():
        rates = (
            ceilings.memory.copy_gigabytes_per_second,
            ceilings.memory.update_shaped_gigabytes_per_second,
        )
        medians = (number_text(None if rate is None else rate.median, 1) for rate in rates)
        dates = {(rate and rate.measured) or ceilings.measured: None for rate in rates}
        table.add_row(name, *medians, ", ".join(dates))
    print_table(table)


def installed_packages() -> dict[str, str]:
    """Version of each package of use here, or that it is not installed."""
    return {
        package: installed_version(package) or "not installed"
        for package in ("hogstream", "torch", "numpy", *_OPTIONAL)
    }


def check_profilers() -> dict[str, str]:
    """Whether NVTX ranges are shown to a tool, or why not; and Nsight's tools."""
    tools = {"NVTX ranges": why_no_ranges() or "a tool is attached"}
    for tool in (NSYS, NCU):
        try:
            found = find_tool(tool)
        except MeasurementError as error:
            tools[tool.title] = str(error)
        else:
            tools[tool.title] = f"{found.version} ({found.path})"
    return tools


def check_backends() -> dict[str, str]:
    """For each backend, that it works (one update was made and was right), or why not."""
    return {name: missing or _try_backend(name) for name, missing in available_backends().items()}


def check_devices() -> dict[str, str]:
    """For each kind of device, its name and lanes, or why there is none."""
    devices = {"cpu": f"{device_name(torch.device('cpu'))}; lanes are threads"}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        lanes = "lanes are CUDA streams" if cuda_devices() else "kernels only: no lanes on ROCm yet"
        devices[str(device)] = f"{device_name(device)}; {lanes}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        devices["cuda"] = (
            "torch sees no CUDA device: is the driver loaded?"
            if built
            else "this torch is built for the CPU only: install a CUDA build of torch"
        )
    return devices


def check_threads() -> dict[str, str]:
    """How many threads torch uses for an operation, and for one of a worker, of all processes."""
    shares = [f"{share_of_cores(count)} with {counted(count, 'worker')}" for count in (1, 2, 4, 8)]
    return {"torch": f"{torch.get_num_threads()}", "a worker": ", ".join(shares)}


def ceilings_of_devices() -> dict[str, Ceilings]:
    """What each device can do at most, by its name in torch."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {str(device): machine_ceilings(device) for device in devices}


def _try_backend(name: str) -> str:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    param, grad = torch.ones(3, device=device), torch.ones(3, device=device)
    try:
        select_backend(name, device)
        rmsprop_(param, grad, torch.zeros_like(param), backend=name)
    except Exception as error:  # whatever it is, the doctor's job is to tell it
        return f"fails: {type(error).__name__}: {error}".splitlines()[0]
    expected = torch.full_like(param, 0.90000005)
    return WORKS if torch.equal(param, expected) else f"wrong result: {param.tolist()}"
