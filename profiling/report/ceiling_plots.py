"""The plots of what kernels, policies and optimizers reach of what the machine can do."""

from __future__ import annotations

from hogstream.profiling.measure.peers import CEILING, HOGSTREAM, MEMORY, PEERS
from hogstream.profiling.report import charts, drawing
from hogstream.profiling.report.charts import Bar, Point, roofline
from hogstream.profiling.report.drawing import LOOKS, Group, Look, Looks, Plot, legible
from hogstream.profiling.report.rows import runs_by_policy, runs_by_size, share_text
from hogstream.profiling.results.records import Spread
from hogstream.profiling.results.schema import Bench, PeerTime
from hogstream.profiling.wording import size_name

#: Arithmetic of an update: what an element takes of it.
OPERATIONS = PEERS[HOGSTREAM].operations_per_element


def rooflines(bench: Bench, looks: Looks) -> list[Plot]:
    """Operations against bytes: how near kernels and policies come to each level's bandwidth."""
    slopes = {
        level.level: level.update_shaped_gigabytes_per_second.median
        for level in bench.ceilings.levels
        if level.update_shaped_gigabytes_per_second
    }
    if not slopes:
        return []
    plots = []
    for elements, runs in runs_by_size(bench).items():
        points = []
        for policy, mine in runs_by_policy(runs).items():
            best = max(mine, key=lambda run: run.updates_per_second.median)
            speed = OPERATIONS * elements * best.updates_per_second.median / 1e9
            if speed > 0 and best.gigabytes_per_second > 0:
                intensity = speed / best.gigabytes_per_second
                points.append(Point(policy, intensity, speed, looks[policy]))
        if points:
            plots.append(roofline(f"{size_name(elements)} elements", slopes, points))
    alone = []
    for kernel in bench.kernels:
        speed = OPERATIONS * kernel.elements / (kernel.milliseconds.median * 1e6)
        intensity = speed / kernel.gigabytes_per_second
        alone.append(Point(kernel.name, intensity, speed, our_look(kernel.name)))
    return [*plots, *([roofline("Kernels alone", slopes, alone)] if alone else [])]


def kernels(bench: Bench) -> Group:
    """The kernels alone, against the ceiling."""
    title = "Kernels alone"
    ceiling = bench.ceilings.memory.update_shaped_gigabytes_per_second
    rows = [
        _speed_bar(kernel.name, kernel.gigabytes_per_second, kernel.milliseconds)
        for kernel in sorted(bench.kernels, key=lambda kernel: -kernel.gigabytes_per_second)
    ]
    if not rows:
        return Group("kernels", title, "", [], {})
    text = f"{rows[0].name} is the fastest with {rows[0].told} GB/s"
    if ceiling is not None:
        share = share_text(rows[0].value / ceiling.median)
        text += f", {share} of the update-shaped ceiling of {ceiling.median:.1f} GB/s (dashed)"
    said = f"{title}: {', '.join(f'{row.name} {row.told} GB/s' for row in rows)}. {text}."
    across = f"GB/s at {size_name(bench.kernels[0].elements)} elements"
    most = None if ceiling is None else ceiling.median
    plot = charts.bars("One large update, all cores", said, across, rows, most)
    return Group("kernels", title, f"{text}.", [plot], {})


def _speed_bar(name: str, speed: float, milliseconds: Spread) -> Bar:
    interval = None
    if milliseconds.interval is not None and milliseconds.interval[0] > 0:
        quick, slow = milliseconds.interval
        interval = (speed * milliseconds.median / slow, speed * milliseconds.median / quick)
    return Bar(name, speed, f"{speed:.1f}", name.startswith(HOGSTREAM), interval)


def optimizers(results: list[PeerTime]) -> list[Plot]:
    """What each optimizer moves at one shape, the fastest first."""
    shape, speeds = results[0].shape, {each.peer: each.gigabytes_per_second for each in results}
    peers = [result for result in results if result.peer not in MEMORY]
    rows = [
        _speed_bar(result.peer, result.gigabytes_per_second, result.milliseconds)
        for result in sorted(peers, key=lambda result: -result.gigabytes_per_second)
    ]
    said = ", ".join(f"{row.name} {row.told}" for row in rows)
    text = f"GB/s at {shape}, the fastest first: {said}."
    across = "GB/s, least traffic"
    return [charts.bars(legible(shape), text, across, rows, speeds.get(CEILING))] if rows else []


def optimizer_roofline(shapes: dict[str, list[PeerTime]]) -> list[Plot]:
    """A roofline of the optimizers at the largest shape."""
    if not shapes:
        return []
    largest = max(shapes.values(), key=lambda results: results[0].elements)
    slopes = {
        "update-shaped" if each.peer == CEILING else "copy": each.gigabytes_per_second
        for each in largest
        if each.peer in MEMORY
    }
    points = [
        Point(
            result.peer,
            intensity := result.operations_per_element / result.bytes_per_element,
            result.gigabytes_per_second * intensity,
            our_look(result.peer),
        )
        for result in largest
        if result.peer not in MEMORY and result.operations_per_element
    ]
    if not slopes or not points:
        return []
    return [roofline(legible(largest[0].shape), slopes, points, 3 * drawing.HEIGHT // 2)]


def our_look(name: str) -> Look:
    """The look of what may be ours, among others."""
    return LOOKS[0 if name.startswith(HOGSTREAM) else 1]
