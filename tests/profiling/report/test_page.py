"""The report as a reader meets it: in a browser, on a phone, in the dark, with hostile files."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import pytest

from hogstream.profiling.report.page import render_report, sort_value, write_page
from hogstream.profiling.results.result_files import ResultFile, parse_result
from report_testing import committed, full_bench, old

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
HARNESS = Path(__file__).resolve().parents[2] / "support" / "report_harness.js"
# Everything that may end an attribute, a text, a comment, a style, a script or an SVG's title.
MARKUP = (
    "\"'--></title></style></script></text></svg><img src=x onerror=parent.hacked=1>"
    "<script>parent.hacked=1</script><b onclick=parent.hacked=1>{{ 7 * 7 }}&lt;"
)

needs_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium on PATH")


def parsed(*results: dict[str, Any], names: tuple[str, ...] = ()) -> list[ResultFile]:
    names = names or tuple(f"{index}.json" for index in range(len(results)))
    return [parse_result(json.dumps(each), name) for each, name in zip(results, names, strict=True)]


def poisoned(value: Any, keep_keys: bool = True) -> Any:
    """A copy in which each string, and each key that is told, has markup at its end."""
    if isinstance(value, dict):
        return {
            (key if keep_keys or key in NEEDED else key + MARKUP): poisoned(each, key not in TOLD)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return value + MARKUP if isinstance(value, str) else value


TOLD = ("environment", "versions", "settings", "failures")  # their keys are told as they are
NEEDED = ("device", "device_name", "backend", "cores", "depth", "batch", "batch_of", "shapes")


@cache
def pages() -> dict[str, tuple[str, int, list[tuple[str, str]]]]:
    """What the browser looks at: a page, the width of its frame, and the headings to press."""
    bench, train, compare = full_bench(), committed("train-digits"), committed("compare")
    everything = render_report(parsed(bench, train, compare))
    two = render_report(parsed(bench, full_bench(speed=1.3, seed=1), train, train))
    bench["results"][0]["failures"] = {"3": "ValueError: no"}
    bench["partial"], bench["error"] = True, "worker 3 failed"
    hostile = parsed(
        *(poisoned(each) for each in (bench, bench, train, compare)),
        names=(MARKUP, "b" + MARKUP, "c", "d"),
    )
    presses = [("Updates", "updates per s"), ("Updates", "elements"), ("Updates", "policy")]
    return {
        "everything": (everything, 1280, [*presses, ("Updates", "gain over locked")]),
        "phone": (everything, 360, []),
        "two": (two, 1280, [("Changes", "second over first")]),
        "phone_two": (two, 360, []),
        "hostile": (render_report(hostile), 1280, []),
        "old": (render_report(parsed(old("races"))), 1280, []),
    }


@cache
def seen(dark: bool) -> dict[str, Any]:
    """What the harness finds in each page, or in the dark in some, and what the console says."""
    frames = "".join(
        f'<iframe name="{name}" style="width:{width}px" data-press="{escape(json.dumps(presses))}" '
        f'srcdoc="{escape(page)}"></iframe>'
        for name, (page, width, presses) in pages().items()
        if not dark or name in ("everything", "two")
    )
    return look(f"<body>{frames}<script>{HARNESS.read_text('utf-8')}</script>", dark)


def look(page: str, dark: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "harness.html"
        path.write_text(f'<!DOCTYPE html><meta charset="utf-8">{page}', encoding="utf-8")
        process = subprocess.run(
            [
                *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"),
                *(f"--user-data-dir={folder}/profile", "--enable-logging=stderr"),
                *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"),
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    match = re.search(r'<pre id="findings">([^<]+)', process.stdout)
    assert match, process.stderr
    found: dict[str, Any] = json.loads(base64.b64decode(match[1]))
    found["console"] = [line for line in process.stderr.splitlines() if "CONSOLE" in line]
    return found


@needs_browser
def test_browser_has_nothing_to_complain_of() -> None:
    assert seen(False)["console"] == seen(True)["console"] == []


@needs_browser
@pytest.mark.parametrize("name", ["everything", "phone", "two", "phone_two", "hostile", "old"])
def test_plots_are_drawn_and_nothing_is_loaded(name: str) -> None:
    page = seen(False)[name]
    assert page["loads"] == page["repeated"] == page["dead"] == []
    assert page["plots"]
    for plot in page["plots"]:
        assert plot["marks"] > 0, plot
        assert plot["empty"] == plot["outside"] == 0, plot
        assert re.search(r"\d", plot["text"]), plot  # what it shows, in figures
        if name != "hostile":  # whose names are as long as they like
            assert plot["cut"] == [], plot


@needs_browser
def test_all_figures_are_there() -> None:
    sections = {plot["section"] for plot in seen(False)["everything"]["plots"]}
    assert sections == {
        *("throughput", "gain", "latency", "staleness", "roofline", "kernels"),
        *("training", "optimizers", "optimizer-roofline"),
    }
    assert seen(False)["two"]["plots"][0]["section"] == "changes-bench"


@needs_browser
@pytest.mark.parametrize("name", ["phone", "phone_two"])
def test_page_is_no_wider_than_a_phone(name: str) -> None:
    assert seen(False)[name]["width"] <= 360


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_is_readable_in_the_light_and_in_the_dark(dark: bool) -> None:
    for name, page in seen(dark).items():
        if name != "console":
            assert page["contrast"][0] >= 4.5, (name, page["contrast"])
            light = sum(map(int, re.findall(r"\d+", page["background"]))) > 3 * 128
            assert light is not dark


@needs_browser
def test_headings_sort_numbers_as_numbers_and_what_is_missing_last() -> None:
    speeds, sizes, policies, gains = seen(False)["everything"]["pressed"]
    for presses, key in (
        (speeds, lambda text: float(text.replace(",", ""))),
        (sizes, lambda text: 2 ** int(text.removeprefix("2^"))),
        (policies, str),
    ):
        assert [press["focused"] for press in presses] == [True, True]
        assert [press["sorts"] for press in presses] == [["ascending"], ["descending"]]
        up, down = (list(map(key, press["column"])) for press in presses)
        assert up == sorted(up)
        assert down == sorted(up, reverse=True)
        assert len(set(up)) > 1
    for press, backwards in zip(gains, (False, True), strict=True):
        told = [float(text.removesuffix("x")) for text in press["column"] if text != "-"]
        assert told == sorted(told, reverse=backwards)
        assert press["column"][len(told) :] == ["-"] * (len(press["column"]) - len(told))
        assert "-" in press["column"]


@needs_browser
def test_markup_in_files_and_their_names_makes_no_element_and_runs_nothing() -> None:
    found = seen(False)
    assert not found["hostile"]["hacked"]
    assert (found["hostile"]["scripts"], found["hostile"]["handlers"]) == (1, 0)
    plain = set(found["everything"]["elements"]) | set(found["two"]["elements"])
    assert set(found["hostile"]["elements"]) <= plain | {"aside"}


def test_markup_is_told_as_text_and_not_evaluated() -> None:
    html = pages()["hostile"][0]
    assert html.count("{{ 7 * 7 }}&amp;lt;") > 100
    assert "<img" not in html
    assert html.count("<script") == html.count("</script") == 1


def test_policy_admits_only_the_page_s_own_style_and_script() -> None:
    html = render_report(parsed(full_bench()))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none';")
    assert "unsafe" not in policy[1]
    markup = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL)
    assert not re.search(r"\b(style|on\w+)=|https?:|[\"'(]//", markup)


@pytest.mark.parametrize(
    "job", ["bench", "small-bench", "processes-bench", "races", "sweep", "compare", "train-digits"]
)
def test_results_of_before_are_told_with_what_they_lack(job: str) -> None:
    html = render_report(parsed(old(job)))
    assert len(html.encode()) < 1e6
    assert escape(committed(job)["command"], quote=False) in html.replace("&#39;", "'")
    if job not in ("compare", "train-digits"):
        assert "The caches&#39; bandwidth was not measured." in html
        assert "only the 50th, 90th and 99th percentiles were kept" in html


def test_largest_sweep_makes_a_small_page() -> None:
    assert len(render_report(parsed(full_bench("sweep"))).encode()) < 3e6


def test_summary_tells_winner_gain_cost_and_ceilings() -> None:
    bench = full_bench("races")
    for result in bench["results"]:
        speed = {"lock-free": 200.0, "locked": 100.0, "ordered": 160.0}[result["policy"]]
        rounds = [speed, speed + 1, speed + 2, speed + 3, speed + 4]
        result |= {"updates_per_second_of_rounds": rounds, "updates_per_second": speed + 2}
    best = next(r for r in bench["results"] if r["policy"] == "lock-free")
    best["updates_per_second_of_rounds"] = [300.0, 303.0, 306.0, 309.0, 312.0]
    best["updates_per_second"] = 306.0
    best["staleness"] |= {"mean": 5.05, "max": 791.0}
    best["lost_updates_fraction"] = 0.0273
    best["share_of_ceilings"] = {
        **{"level": "L2", "bandwidth": 0.61},
        **{"launch_rate": 0.2, "event_loop_rate": 0.3},
    }
    html = render_report(parsed(bench))
    for said in (
        "Lock-free is the fastest at each of 3 sizes, at 3 of them beyond noise over every other",
        "The greatest gain of lock-free over locked is 3.00x (95 %: 3.00 to 3.00) with 2 workers",
        " elements, 5.0 updates on average and 791 at most",
        "2.73 % of the updates were lost",
        " elements it takes 61 % of the bandwidth of L2, 20 % of the launch rate of a lane, 30 %",
        bench["warnings"][0],
    ):
        assert said in html


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("2^10", 1024),
        ("(1.10x)", 1.1),
        ("5.5/7", 5.5),
        ("12 %", 12),
        ("-", None),
        ("lock-free", None),
    ],
)
def test_cells_are_sorted_by_the_number_that_they_begin_with(
    text: str, value: float | None
) -> None:
    assert sort_value(text) == value


def test_less_than_a_number_comes_before_it() -> None:
    assert sort_value("<0.01 %") < sort_value("0.01 %")  # type: ignore[operator]


def test_what_is_no_character_does_not_stop_the_report(tmp_path: Path) -> None:
    bench = full_bench()
    bench["environment"]["device_name"] = "lone \ud800 surrogate"
    write_page(render_report(parsed(bench)), tmp_path / "report.html")
    assert "lone ? surrogate" in (tmp_path / "report.html").read_text("utf-8")


def test_latencies_in_one_bin_are_drawn_and_told() -> None:
    bench = full_bench()
    for result in bench["results"]:
        result["latency_us"]["histogram"] = {"edges_us": [10.0, 11.0], "counts": [95]}
    html = render_report(parsed(bench))
    latency = html.partition('id="latency"')[2].partition('id="staleness"')[0]
    assert latency.count("<svg") >= 2
    assert re.search(r"1[01](\.\d+)? us", latency)
