"""The ``hogstream`` command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

# How many streams may really run at once; CUDA reads it when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

try:
    import click
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
except ModuleNotFoundError as missing:
    sys.exit(f"hogstream: {missing.name} is not installed; pip install 'hogstream[bench]'")

import torch

from hogstream.kernels import available_backends
from hogstream.profiling import bench as bench_job
from hogstream.profiling import compare as compare_job
from hogstream.profiling import digits as digits_job
from hogstream.profiling import doctor as doctor_job
from hogstream.profiling import kernel_inspection as inspect_job
from hogstream.profiling import options, plots, summary
from hogstream.profiling.console import Steps, figure, new_table, print_table, print_text, steps
from hogstream.profiling.environment import describe_environment
from hogstream.profiling.peers import PEERS
from hogstream.profiling.report import render_report
from hogstream.profiling.shapes import MODELS, Shape
from hogstream.scheduler.policies import POLICIES

_DEVICE = click.option(
    "--device",
    type=options.device,
    metavar="DEVICE",
    default="best",
    show_default=True,
    help="best, cpu, cuda or cuda:N. best is CUDA if there is one.",
)
_BACKEND = click.option(
    "--backend",
    type=click.Choice(list(available_backends())),
    help="Which kernels.  [default: the best for the device]",
)
_SEED = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of all random input.",
)
_JSON = click.option(
    "--json",
    "json_file",
    type=options.output_file,
    metavar="FILE",
    help="Write results to this file.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="hogstream")
@click.pass_context
def cli(context: click.Context) -> None:
    """Asynchronous RMSprop: what going without a lock buys, and what it costs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@_DEVICE
@_BACKEND
@click.option("--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True)
@click.option(
    "--workers",
    type=options.worker_counts,
    metavar="N,N,...",
    default="1,2,4,8",
    show_default=True,
    help="Worker counts.",
)
@click.option(
    "--elements",
    type=options.sizes,
    metavar="N,N,...",
    default="2^16,2^20",
    show_default=True,
    help="Sizes of the shared parameters.",
)
@click.option(
    "--policies",
    type=options.policies,
    metavar="POLICY,...",
    default=",".join(POLICIES),
    show_default=True,
    help="What an update waits for.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How many updates of one worker may be in flight.",
)
@click.option(
    "--seconds",
    type=options.seconds_above_zero,
    metavar="SECONDS",
    default=3.0,
    show_default=True,
    help="Time for each policy, worker count and size, in five rounds.",
)
@click.option(
    "--think-time",
    type=options.number_from_zero,
    metavar="SECONDS",
    default=0.0,
    show_default=True,
    help="Median seconds that a worker thinks before it submits.",
)
@click.option(
    "--think-spread",
    type=options.number_from_zero,
    metavar="SIGMA",
    default=0.0,
    show_default=True,
    help="Sigma of the log-normal think times; 0 is constant, 1 makes stragglers.",
)
@_SEED
@_JSON
@click.option(
    "--report", type=options.output_file, metavar="FILE", help="Write an HTML report to this file."
)
def bench(
    device: torch.device,
    backend: str | None,
    dtype: str,
    workers: tuple[int, ...],
    elements: tuple[int, ...],
    policies: tuple[str, ...],
    depth: int,
    seconds: float,
    think_time: float,
    think_spread: float,
    seed: int,
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Measure lock-free updates against locked and ordered ones.

    Simulated workers submit ready gradients as fast as they land. Policies take turns, so that
    drift of the machine strikes them alike.
    """
    settings = bench_job.BenchSettings(
        device=device,
        backend=options.resolve_backend(backend, device),
        dtype=getattr(torch, dtype),
        workers=workers,
        elements=elements,
        policies=policies,
        depth=depth,
        seconds=seconds,
        think_time=think_time,
        think_spread=think_spread,
        seed=seed,
    )
    _check_distinct("--json", json_file, "--report", report)
    try:
        bench_job.check_memory(settings)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--elements'") from None
    with steps(settings.steps()) as progress:
        result = bench_job.run_bench(settings, progress.begin)
    result["command"] = _command_line()
    written = [_write_json(json_file, result)]  # before anything is printed, which may fail
    if report is not None:
        written.append(_write(report, render_report(result)))
    print_table(summary.kernels_table(result))
    print_table(summary.results_table(result))
    for sentence in summary.sentences(result):
        print_text(sentence)
    _say_written(written)


@cli.command()
@_DEVICE
@click.option(
    "--shapes",
    type=options.shapes,
    metavar="SHAPE,...",
    help=f"What a step updates: {', '.join(MODELS)}, one tensor of N or 2^N elements, or "
    f"TxN, which is T of them.  [default: {compare_job.DEFAULT_SHAPES}; on a GPU 2^28 too]",
)
@click.option(
    "--peers",
    type=options.peers,
    metavar="NAME,...",
    default=",".join(PEERS),
    help=f"Optimizers to measure: {', '.join(PEERS)}.  [default: all]",
)
@click.option(
    "--seconds",
    type=options.seconds_above_zero,
    metavar="SECONDS",
    default=6.0,
    show_default=True,
    help="Time to measure each shape, in seven rounds at least.",
)
@_SEED
@_JSON
@click.option(
    "--plot",
    type=options.picture_file,
    metavar="FILE",
    help="Save bandwidths and a roofline: .png, .svg or .pdf.",
)
def compare(
    device: torch.device,
    shapes: tuple[Shape, ...] | None,
    peers: tuple[str, ...],
    seconds: float,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure hogstream against other optimizers.

    Each does steps of the same tensors, in turn, in a new random order each round. Whatever cannot
    run here is listed with the reason. Shapes that fit the caches are measured warm: a sample
    repeats the step for 20 ms.
    """
    _check_distinct("--json", json_file, "--plot", plot)
    try:
        for shape in shapes or ():
            compare_job.check_memory(shape, peers, device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--shapes'") from None
    settings = compare_job.CompareSettings(
        device=device,
        backend=options.resolve_backend(None, device),
        shapes=shapes or options.shapes(compare_job.default_shapes(device)),
        peers=peers,
        seconds=seconds,
        seed=seed,
    )
    with steps(settings.steps()) as progress:
        result = compare_job.run_compare(settings, progress.begin)
    result["command"] = _command_line()
    written = [_write_json(json_file, result), plot]
    if plot is not None:
        plots.compare(result, plot)
    for table in summary.compare_tables(result):
        print_table(table)
    for sentence in summary.compare_sentences(result):
        print_text(sentence)
    _say_written(written)


@cli.group(invoke_without_command=True)
@click.pass_context
def train(context: click.Context) -> None:
    """Train a model with asynchronous workers."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@train.command("digits")
@_DEVICE
@_BACKEND
@click.option(
    "--workers",
    type=click.IntRange(1, options.MAX_WORKERS),
    default=4,
    show_default=True,
    help="How many workers.",
)
@click.option(
    "--policy",
    type=click.Choice([*POLICIES, "all"]),
    default="lock-free",
    show_default=True,
    help="What an update waits for; all runs each in turn.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="How often each image is seen, over all workers.",
)
@_SEED
@_JSON
@click.option(
    "--plot",
    type=options.picture_file,
    metavar="FILE",
    help="Save loss against time: .png, .svg or .pdf.",
)
def train_digits(
    device: torch.device,
    backend: str | None,
    workers: int,
    policy: str,
    epochs: int,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Train an MLP on scikit-learn's handwritten digits (1,797 images of 8 by 8)."""
    _check_distinct("--json", json_file, "--plot", plot)
    settings = digits_job.TrainSettings(
        device=device,
        backend=options.resolve_backend(backend, device),
        workers=workers,
        epochs=epochs,
        seed=seed,
    )
    digits = digits_job.load_digits(settings)
    policies = list(POLICIES) if policy == "all" else [policy]
    with steps(len(policies) * digits_job.updates_of(settings, digits)) as progress:
        results = [
            digits_job.train(
                settings,
                name,
                digits,
                partial(_show_loss, progress, name),
            )
            for name in policies
        ]
    environment = describe_environment(device, settings.backend)
    result = {
        "schema": bench_job.SCHEMA,
        "command": _command_line(),
        "environment": environment,
        "results": results,
    }
    written = [_write_json(json_file, result), plot]
    if plot is not None:
        plots.loss_against_time(results, plot)
    print_table(summary.training_table(results))
    _say_written(written)


def _show_loss(progress: Steps, policy: str, loss: float) -> None:
    progress.advance(f"{policy}, loss {loss:.4f}")


@cli.command()
def doctor() -> None:
    """Say what is installed and what works here.

    What does not work is listed with the reason.
    """
    for title, rows in (
        ("Installed", doctor_job.installed_packages()),
        ("Devices", doctor_job.check_devices()),
        ("Backends", doctor_job.check_backends()),
    ):
        table = new_table(title, "", "", text_columns=2)
        for name, text in rows.items():
            table.add_row(name, text)
        print_table(table)
    table = new_table("Bandwidth", "device", "copy GB/s", "update-shaped GB/s")
    for name, ceilings in doctor_job.measure_bandwidth().items():
        table.add_row(
            name,
            figure(ceilings["copy_gigabytes_per_second"], 1),
            figure(ceilings["update_shaped_gigabytes_per_second"], 1),
        )
    print_table(table)


@cli.command("inspect")
@click.option(
    "--target",
    type=click.Choice(list(inspect_job.TARGETS)),
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
@_JSON
def inspect_kernels(target: str, kernel: str, emit: str | None, json_file: Path | None) -> None:
    """Compile the kernels and say what they do.

    The device that they are compiled for need not be here.

    Registers and accesses are one thread's. Loads and stores are those of full, aligned blocks:
    6x128 is six of 128 bits. Elsewhere accesses are masked, and as wide as said there. Spills are
    in bytes on NVIDIA, in registers on AMD. Fused and approximate operations are those asked for:
    not those of which a correctly rounded root or division is made.
    """
    allowed = inspect_job.TARGETS[target]
    if emit is not None and emit not in allowed:
        raise click.BadParameter(
            f"{target} has {' and '.join(allowed)}, got '{emit}'", param_hint="'--emit'"
        )
    compiled = _compile(target, kernel, emit)
    inspected = {
        variant: inspect_job.inspect_kernel(target, code) for variant, code in compiled.items()
    }
    result = {
        "schema": bench_job.SCHEMA,
        "command": _command_line(),
        "environment": describe_environment(torch.device("cpu"), "triton"),
        "results": [inspect_job.describe(target, *each) for each in inspected.items()],
    }
    written = [_write_json(json_file, result)]
    if emit is not None:
        for variant, code in compiled.items():
            click.echo(f"// {variant.name}\n{code[emit]}")
        return
    print_table(inspect_job.inspection_table(target, inspected))
    _say_written(written)


def _compile(
    target: str, words: str, emit: str | None
) -> dict[inspect_job.Variant, inspect_job.Code]:
    try:
        variants = inspect_job.variants_named(words)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--kernel'") from None
    compiled = {}
    try:
        with steps(len(variants)) as progress:
            for variant, code in inspect_job.compile_kernels(target, words, emit):
                compiled[variant] = code
                progress.advance(variant.name)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    return compiled


def main() -> NoReturn:
    """Runs the command; bad input is one line on standard error and exit status 2."""
    try:
        cli.main(prog_name="hogstream", standalone_mode=False)
    except click.ClickException as error:
        print("hogstream:", " ".join(error.format_message().split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"hogstream: {error}", file=sys.stderr)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        print("hogstream: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _check_distinct(option: str, path: Path | None, other: str, other_path: Path | None) -> None:
    if path is not None and other_path is not None and path.resolve() == other_path.resolve():
        raise click.UsageError(f"{option} and {other} must be different files, got '{path}' twice")


def _command_line() -> str:
    return shlex.join(["hogstream", *sys.argv[1:]])


def _write_json(path: Path | None, result: dict[str, Any]) -> Path | None:
    if path is None:
        return None
    return _write(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _say_written(paths: list[Path | None]) -> None:
    for path in paths:
        if path is not None:
            click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
