"""Reading Nsight Compute's CSV, and setting bytes against what an update needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hogstream.profiling.nsight import workload
from nsight_testing import METRICS, details_csv, raw_csv

Command = Callable[..., tuple[int, str, str]]
Read = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def read(hogstream: Command, tmp_path: Path) -> Read:
    """Reads CSV, and returns the JSON and what was printed."""

    def run(text: str, *options: object) -> tuple[dict[str, Any], str]:
        csv, json_file = tmp_path / "ncu.csv", tmp_path / "out.json"
        csv.write_text(text, "utf-8")
        status, out, err = hogstream("profile", "read", csv, "--json", json_file, *options)
        assert (status, err) == (0, "")
        return json.loads(json_file.read_text()), out

    return run


@pytest.mark.parametrize("layout", [raw_csv, details_csv])
def test_both_layouts_are_read(read: Read, layout: Callable[..., str]) -> None:
    slower = {"gpu__time_duration.sum": "210,600", "dram__bytes_write.sum": "7,800,000"}
    other = {"Kernel Name": "multi_tensor_rmsprop_kernel", "Grid Size": "(512, 1, 1)"}
    result, out = read(layout({}, slower, slower, other), "--elements", "10^6")
    assert (result["kind"], result["schema"]) == ("profile ncu", 2)
    single, multi = result["results"]
    time = single.pop("time_us")
    assert time["samples"] == pytest.approx([105.3, 210.6, 210.6])
    assert time["median"] == pytest.approx(210.6)
    assert time["interval"] is None  # three launches bound nothing
    assert single == pytest.approx(
        {
            "kernel": "rmsprop_kernel",
            "grid": "(976, 1, 1)",
            "block": "(128, 1, 1)",
            "launches": 3,
            "dram_percent": 92.5,  # medians of the launches
            "bytes_read": 12e6,
            "bytes_written": 7.8e6,
            "gigabytes_per_second": 19.8e6 / 210_600,
            "elements": 1_000_000,
            "bytes_read_per_element": 12.0,
            "bytes_written_per_element": 7.8,
            "bytes_per_element": 19.8,
            "registers": 40,
            "occupancy_percent": 61.25,
        }
    )
    assert (multi["kernel"], multi["launches"]) == ("multi_tensor_rmsprop_kernel", 1)
    said = " ".join(out.split())
    assert "19.80 by rmsprop_kernel (0.99x)" in said
    assert "19.60 by multi_tensor_rmsprop_kernel (0.98x)" in said


def test_without_elements_bytes_are_not_compared(read: Read) -> None:
    result, out = read(raw_csv({}))
    (entry,) = result["results"]
    assert entry["elements"] is None
    assert entry["bytes_read_per_element"] is None
    assert entry["bytes_read"] == 12e6
    assert "--elements sets the bytes" in " ".join(out.split())


def test_launches_of_other_sizes_are_told_apart(read: Read) -> None:
    result, _ = read(raw_csv({}, {"Grid Size": "(2, 1, 1)"}, {"Block Size": "(64, 1, 1)"}))
    assert [entry["launches"] for entry in result["results"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("time", "read_", "microseconds", "megabytes"),
    [
        (("nsecond", "105300"), ("byte", "12000000"), 105.3, 12),
        (("us", "105.30"), ("Mbyte", "12.00"), 105.3, 12),
        (("usecond", "1,105.30"), ("Kbyte", "12,000.5"), 1105.3, 12.0005),
        (("ms", "1.50"), ("Gbyte", "1.25"), 1500, 1250),
        (("second", "2"), ("Tbyte", "1"), 2e6, 1e6),
        (("s", "1.053e-04"), ("byte", "1.2e+07"), 105.3, 12),
    ],
)
def test_units(
    read: Read,
    time: tuple[str, str],
    read_: tuple[str, str],
    microseconds: float,
    megabytes: float,
) -> None:
    metrics = {
        **METRICS,
        "gpu__time_duration.sum": time,
        "dram__bytes_read.sum": read_,
        "dram__bytes_write.sum": ("byte", "0"),
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "92.5"),
        "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "61.25"),
    }
    (entry,) = read(raw_csv({}, metrics=metrics))[0]["results"]
    assert entry["time_us"]["median"] == pytest.approx(microseconds)
    assert entry["bytes_read"] == pytest.approx(1e6 * megabytes)
    assert (entry["dram_percent"], entry["occupancy_percent"]) == (92.5, 61.25)


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "92,5"),
        ("gpu__time_duration.sum", "1.105,30"),
        ("dram__bytes_read.sum", "12.000.000"),
        ("gpu__time_duration.sum", "1 105"),
        ("gpu__time_duration.sum", "1,10,500"),
    ],
)
def test_numbers_of_another_locale_are_refused_with_what_to_do(
    hogstream: Command, tmp_path: Path, metric: str, text: str
) -> None:
    file = tmp_path / "german.csv"
    file.write_text(raw_csv({metric: text}), "utf-8")
    said = refused(hogstream, file)
    assert f"{text!r} is no number as the C locale has it; run ncu with LC_ALL=C" in said


@pytest.mark.parametrize("value", ["n/a", "", "(!) n/a", "nan", "(!) nan", "inf"])
def test_metrics_that_were_not_measured_are_null(read: Read, value: str) -> None:
    (entry,) = read(raw_csv({"dram__bytes_read.sum": value}), "--elements", "5")[0]["results"]
    assert (entry["bytes_read"], entry["gigabytes_per_second"]) == (None, None)
    assert entry["bytes_per_element"] is None
    assert entry["bytes_written_per_element"] == 7.6e6 / 5


def test_metrics_may_be_missing_and_others_there(read: Read) -> None:
    metrics = {"sm__cycles_active.avg": ("cycle", "5"), "gpu__time_duration.sum": ("ns", "7")}
    (entry,) = read(raw_csv({}, metrics=metrics))[0]["results"]
    assert (entry["dram_percent"], entry["registers"]) == (None, None)
    assert entry["time_us"]["median"] == 0.007


def test_names_are_printed_as_they_are(read: Read) -> None:
    name = "k<[red]x[/]>(a, b)\x1b[31m"
    result, out = read(raw_csv({"Kernel Name": name}), "--elements", "1000")
    assert result["results"][0]["kernel"] == name
    assert "k<[red]x[/]>(a, b)?[31m" in out


def refused(hogstream: Command, file: Path) -> str:
    status, out, err = hogstream("profile", "read", file)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(file) in err
    return err


@pytest.mark.parametrize("layout", [raw_csv, details_csv])
def test_torn_files_are_refused_in_one_line(
    hogstream: Command, tmp_path: Path, layout: Callable[..., str]
) -> None:
    torn, text = tmp_path / "torn.csv", layout({}, {})
    ends = text.rindex('"\n"1"') + 1  # of the last line but one, of any layout
    for size in (1, 3, 60, 150, text.index('"\n') - 4, ends + 2, ends + 40, ends + 130):
        torn.write_text(text[:size], "utf-8")
        refused(hogstream, torn)
    torn.write_text(text[: text.rindex('"1","1234"') + 20], "utf-8")
    assert "is damaged, or no CSV of Nsight Compute" in refused(hogstream, torn)


def test_a_file_cut_in_its_last_cells_is_refused(hogstream: Command, tmp_path: Path) -> None:
    torn, text = tmp_path / "torn.csv", raw_csv({}, {})
    torn.write_text(text[:-2], "utf-8")  # 61.25 without the quote
    assert "unexpected end of data" in refused(hogstream, torn)
    torn.write_text(text.rpartition(",")[0], "utf-8")
    assert "row 3 has 16 of 17 columns" in refused(hogstream, torn)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello\n", "it has no line of names"),
        (b'"ID","Process ID"\n', "it has no line of names"),
        (b'"Time (%)","Name"\n"1","x"\n', "it has no line of names"),
        (b"\x80\x81\x82", "is damaged, or no CSV"),
        (raw_csv().encode(), "holds no kernel"),
        (b"==WARNING== No kernels were profiled.\n", "it has no line of names"),
        (b'"ID","Kernel Name"\n"0","k"\n', "it has no row of units"),
        (raw_csv({"gpu__time_duration.sum": "fast"}).encode(), "fast"),
        (
            raw_csv({}, metrics={"gpu__time_duration.sum": ("week", "1")}).encode(),
            "no column 'week', or a unit",
        ),
    ],
)
def test_what_is_no_csv_of_ncu_is_refused(
    hogstream: Command, tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(content)
    assert said in refused(hogstream, file)


def test_workload_updates_all_elements_with_both_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updated: list[tuple[str, int]] = []
    for name in ("rmsprop_", "multi_tensor_rmsprop_"):
        real = getattr(workload, name)

        def record(params: Any, *rest: Any, real: Any = real, name: str = name, **how: Any) -> None:
            tensors = [params] if isinstance(params, torch.Tensor) else params
            updated.append((name, sum(tensor.numel() for tensor in tensors)))
            real(params, *rest, **how)

        monkeypatch.setattr(workload, name, record)
    workload.update(1000, torch.device("cpu"))
    launches = 1 + workload.LAUNCHES
    assert updated == [("rmsprop_", 1000), ("multi_tensor_rmsprop_", 1000)] * launches
