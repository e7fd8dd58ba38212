"""The page as a reader meets it: in a browser, on a phone, in the dark, with hostile files."""

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

import msgspec
import pytest

from hogstream.profiling.report.page import render_page, sort_value, write_page
from hogstream.profiling.results.files import Reported, ResultFile
from hogstream.profiling.results.schema import Bench, Compare, Histogram, Train
from report_testing import committed, full_bench, with_today

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
HARNESS = Path(__file__).resolve().parents[2] / "support" / "report_harness.js"
# Everything that may end an attribute, a text, a comment, a style, a script or an SVG's title, and
# what matplotlib would take for a formula.
MARKUP = (
    "\"'--></title></style></script></text></svg><img src=x onerror=parent.hacked=1>"
    "<script>parent.hacked=1</script><b onclick=parent.hacked=1>{{ 7 * 7 }}&lt;$\\frac{"
)

# Of which not everything is allowed.
UNPOISONED = ("kind", "measured", "spread_over")

needs_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium on PATH")


def named(*results: Reported) -> list[ResultFile]:
    return [ResultFile(f"{index}.json", each) for index, each in enumerate(results)]


def poisoned(result: Reported) -> Reported:
    """A copy in which each string, and each key that is a name, has markup at its end."""
    return msgspec.convert(_poisoned(msgspec.to_builtins(result), ""), type(result), str_keys=True)


def _poisoned(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        ending = MARKUP if field in ("versions", "peer_versions", "failures") else ""
        return {f"{key}{ending}": _poisoned(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_poisoned(each, field) for each in value]
    return value + MARKUP if isinstance(value, str) and field not in UNPOISONED else value


@cache
def pages() -> dict[str, tuple[str, int, list[tuple[str, str]]]]:
    """What the browser looks at: a page, the width of its frame, and the headings to press."""
    bench, train, compare = measured()
    everything = render_page(named(bench, train, compare))
    two = render_page(named(bench, full_bench(speed=1.3, seed=1), train, train))
    presses = [("Updates", "updates per s"), ("Updates", "elements"), ("Updates", "policy")]
    alone: dict[str, tuple[str, int, list[tuple[str, str]]]] = {
        f"{kind}_{width}": (render_page(named(*files)), width, [])
        for kind, files in (
            ("bench", [bench]),
            ("train", [train]),
            ("compare", [compare]),
            ("diff", [bench, full_bench(speed=1.3, seed=1)]),
        )
        for width in (1200, 390)
    }
    return {
        "everything": (everything, 1280, [*presses, ("Updates", "gain")]),
        "phone": (everything, 360, []),
        "two": (two, 1280, [("Changes", "second over first")]),
        "phone_two": (two, 360, []),
        "hostile": (hostile(), 1280, []),
        "phone_hostile": (hostile(), 360, []),
        **alone,
    }


def measured() -> tuple[Bench, Train, Compare]:
    return with_today(full_bench()), committed("train-digits", Train), committed("compare", Compare)


@cache
def hostile() -> str:
    bench, train, compare = measured()
    bench.results[0].failures = {"3": "ValueError: no"}
    bench.partial, bench.error = True, "worker 3 failed"
    names = (MARKUP, "b" + MARKUP, "c", "d")
    results: tuple[Reported, ...] = (bench, bench, train, compare)
    files = zip(names, map(poisoned, results), strict=True)
    return render_page([ResultFile(name, result) for name, result in files])


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
                *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking", "--disable-sync"),
                *("--disable-component-update", "--enable-logging=stderr"),
                f"--user-data-dir={folder}/profile",
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


@pytest.mark.slow
@needs_browser
def test_browser_has_nothing_to_complain_of() -> None:
    assert seen(False)["console"] == seen(True)["console"] == []


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    "name", ["everything", "phone", "two", "phone_two", "hostile", "phone_hostile"]
)
def test_plots_are_drawn_and_nothing_is_loaded(name: str) -> None:
    page = seen(False)[name]
    assert page["loads"] == page["repeated"] == page["dead"] == []
    assert page["plots"]
    for plot in page["plots"]:
        assert plot["marks"] > 0, plot
        assert plot["empty"] == 0, plot
        if "hostile" not in name:  # whose names are as long as they like
            assert (plot["outside"], plot["cut"]) == (0, []), plot


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", ["everything", "two"])
def test_each_plot_is_told_in_words_too(name: str) -> None:
    for plot in seen(False)[name]["plots"]:
        assert plot["role"] == "img"
        assert re.search(r"\d", plot["text"]), plot  # what it shows, in numbers
        assert plot["text"] in plot["words"]


@pytest.mark.slow
@needs_browser
def test_all_plots_are_there() -> None:
    sections = {plot["section"] for plot in seen(False)["everything"]["plots"]}
    assert sections == {
        *("throughput", "gain", "latency", "staleness", "roofline", "kernels"),
        *("training", "optimizers", "optimizer-roofline"),
    }
    assert seen(False)["two"]["plots"][0]["section"] == "changes-bench"


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", ["phone", "phone_two", "phone_hostile"])
def test_page_is_no_wider_than_a_phone(name: str) -> None:
    assert seen(False)[name]["width"] <= 360


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1200, 800), (390, 844)])
@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("bench", ["Gain at best", "Cost: staleness", "Cost: lost updates", "Machine"]),
        ("train", ["As fast as by hand", "Cost: staleness", "Cost: lost updates", "Machine"]),
        ("compare", ["At resnet50, the largest", "Machine"]),
        ("diff", ["Changed beyond noise", "Faster, the most", "Like for like", "Machine"]),
    ],
)
def test_first_screen_answers(kind: str, facts: list[str], width: int, height: int) -> None:
    page = seen(False)[f"{kind}_{width}"]
    assert page["answered"] <= height
    assert set(facts) <= set(page["facts"])


@pytest.mark.slow
@needs_browser
def test_warnings_come_last() -> None:
    for name in ("everything", "two", "hostile"):
        assert seen(False)[name]["last"] == "warnings"


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_is_readable_in_the_light_and_in_the_dark(dark: bool) -> None:
    for name, page in seen(dark).items():
        if name != "console":
            assert page["contrast"][0] >= 4.5, (name, page["contrast"])
            light = sum(map(int, re.findall(r"\d+", page["background"]))) > 3 * 128
            assert light is not dark


@pytest.mark.slow
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


@pytest.mark.slow
@needs_browser
def test_markup_in_files_and_their_names_makes_no_element_and_runs_nothing() -> None:
    found = seen(False)
    assert not found["hostile"]["hacked"]
    assert (found["hostile"]["scripts"], found["hostile"]["handlers"]) == (1, 0)
    plain = set(found["everything"]["elements"]) | set(found["two"]["elements"])
    assert set(found["hostile"]["elements"]) <= plain


def test_markup_is_told_as_text_and_not_evaluated() -> None:
    html = hostile()
    assert html.count("{{ 7 * 7 }}&amp;lt;") > 100
    assert "<img" not in html
    assert html.count("<script") == html.count("</script") == 1


def test_page_names_nothing_outside_of_itself() -> None:
    html = render_page(named(*measured()))
    markup = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL)
    assert not re.search(r"\b(src|on\w+)=|https?:|[\"'(]//|url\(|@import", markup)
    assert not re.search(r"https?:|url\(|@import|fetch|import\(", html)


@pytest.mark.parametrize("job", ["small-bench", "processes-bench", "races"])
def test_committed_results_make_small_pages(job: str) -> None:
    bench = committed(job, Bench)
    html = render_page(named(bench))
    assert len(html.encode()) < 1e6
    assert escape(bench.command, quote=False) in html.replace("&#39;", "'")


@pytest.mark.slow
def test_largest_sweep_makes_a_small_page() -> None:
    assert len(render_page(named(full_bench("sweep"))).encode()) < 3e6


def test_the_same_results_make_the_same_page() -> None:
    assert render_page(named(full_bench("races"))) == render_page(named(full_bench("races")))


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


def test_what_is_no_character_does_not_stop_the_page(tmp_path: Path) -> None:
    bench = full_bench()
    bench.environment.device_name = "lone \ud800 surrogate"
    for run in bench.results:
        run.policy += "\ud800\x1b[31m\n"
    write_page(named(bench), tmp_path / "page.html")
    assert "lone ? surrogate" in (tmp_path / "page.html").read_text("utf-8")


def test_latencies_in_one_bin_are_drawn_and_told() -> None:
    bench = full_bench()
    for run in bench.results:
        run.latency_us.histogram = Histogram(edges_us=[10.0, 11.0], counts=[95])
    html = render_page(named(bench))
    latency = html.partition('id="latency"')[2].partition('id="staleness"')[0]
    assert latency.count('<svg class="plot"') + latency.count('class="plot"') >= 2
    assert re.search(r"1[01](\.\d+)? us", latency)
