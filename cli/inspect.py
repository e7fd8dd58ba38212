"""``hogstream inspect``."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import click
import torch

from hogstream.cli import options
from hogstream.cli.console import print_table, steps
from hogstream.cli.inspection_table import inspection_table
from hogstream.cli.output import command_line, deliver
from hogstream.profiling.assembly import inspection as job
from hogstream.profiling.environment import describe_environment
from hogstream.profiling.results.files import write_result
from hogstream.profiling.results.profile_schema import Inspection


@click.command("inspect")
@click.option(
    "--target",
    type=click.Choice(list(job.TARGETS)),
    required=True,
    help="Device to compile for.",
)
@click.option(
    "--kernel",
    metavar="WORDS",
    default="",
    help="Only kernels with these words in their names: 'multi_tensor float32 inside'.",
)
@click.option(
    "--emit",
    type=click.Choice(["ptx", "sass", "amdgcn"]),
    help="Print the kernels' assembly and no table.",
)
@options.JSON
def inspect_kernels(target: str, kernel: str, emit: str | None, json_file: Path | None) -> None:
    """Compile the kernels and say what they do.

    The device that they are compiled for need not be here.

    Registers and accesses are one thread's. Loads and stores are those of full, aligned blocks:
    6x128 is six of 128 bits. Elsewhere accesses are masked, and as wide as said there. Spills are
    in bytes on NVIDIA, in registers on AMD. Fused and approximate operations are those asked for:
    not those of which a correctly rounded root or division is made.
    """
    allowed = job.TARGETS[target]
    if emit is not None and emit not in allowed:
        raise click.BadParameter(
            f"{target} has {' and '.join(allowed)}, got '{emit}'", param_hint="'--emit'"
        )
    compiled = _compile(target, kernel, emit)
    inspected = {variant: job.inspect_kernel(target, code) for variant, code in compiled.items()}
    result = Inspection(
        command=command_line(),
        environment=describe_environment(torch.device("cpu"), "triton"),
        results=[job.describe(target, *each) for each in inspected.items()],
    )

    def show() -> None:
        if emit is None:
            print_table(inspection_table(target, inspected))
            return
        for variant, code in compiled.items():
            click.echo(f"// {variant.name}\n{code[emit]}")

    deliver(result, show, (json_file, partial(write_result, result)), raw=emit is not None)


def _compile(target: str, words: str, emit: str | None) -> dict[job.Variant, job.Code]:
    try:
        variants = job.variants_named(words)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--kernel'") from None
    compiled = {}
    try:
        with (
            steps(len(variants)) as progress,
            closing(job.compile_kernels(target, words, emit)) as kernels,
        ):
            for variant, code in kernels:
                compiled[variant] = code
                progress.advance(variant.name)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    return compiled
