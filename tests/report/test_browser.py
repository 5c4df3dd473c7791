"""The page in a real browser: drawn, without an error, without a request, and no wider than a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.report import write_report

pytestmark = pytest.mark.system

WATCH = """<script>
  window.complaints = [];
  for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"]) {
    addEventListener(kind, (e) => complaints.push(`${kind}: ${e.message || e.reason || e.blockedURI}`));
  }
</script>"""
MEASURE = """<script>
  setTimeout(() => {
    const plots = {};
    const drawn = (path) => path.getTotalLength() > 50;
    for (const plot of document.querySelectorAll(".plot")) {
      plots[plot.id] = {
        lines: [...plot.querySelectorAll(".scatterlayer .js-line")].filter(drawn).length,
        points: plot.querySelectorAll(".scatterlayer .point").length,
        bars: plot.querySelectorAll(".barlayer .point path").length,
        errorbars: plot.querySelectorAll(".errorbar .yerror").length,
        shapes: plot.querySelectorAll(".shapelayer path").length,
        width: plot.querySelector(".main-svg").getBoundingClientRect().width,
        textColor: getComputedStyle(plot.querySelector(".xtick text, .ytick text")).fill,
      };
    }
    const root = document.documentElement;
    window.parent.postMessage({
      complaints: window.complaints, plots,
      requests: performance.getEntriesByType("resource").map((entry) => entry.name),
      innerWidth: window.innerWidth, scrollWidth: root.scrollWidth,
      tableScrolls: [...document.querySelectorAll(".scroll")].some((b) => b.scrollWidth > b.clientWidth),
      compareScrolls: [...document.querySelectorAll(".scroll:has(> .compare)")].some(
        (box) => box.scrollWidth > box.clientWidth),
      reasonsCut: [...document.querySelectorAll("td.reason")].some(
        (cell) => cell.offsetLeft + cell.offsetWidth > cell.closest(".scroll").clientWidth + 1),
      inkColor: getComputedStyle(document.body).color,
    }, "*");
  }, 500);
</script></body>"""
# Chromium's own window cannot be as narrow as a phone; a frame can, and media queries go by the frame.
PLOTS = ("loss", "search", "compute", "lr", "velocity", "discarded", "throughput")
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body>
<script>
  addEventListener("message", (e) => { document.body.dataset.found = JSON.stringify(e.data); });
</script><iframe src="page.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe></body>"""


def look_at(page: Path, width: int, dark: bool, folder: Path) -> dict[str, Any]:
    """What a script inside the page found after it was drawn at this width in CSS pixels."""
    chromium = shutil.which("chromium")
    assert chromium, "this test needs Debian's package chromium: apt-get install chromium"
    content = page.read_text(encoding="utf-8")
    content = content.replace("<head>", "<head>" + WATCH, 1)
    body, end, rest = content.rpartition("</body>")
    assert end
    (folder / "page.html").write_text(body + MEASURE + rest, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000",
        "--virtual-time-budget=20000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, f"the page reported nothing; chromium exited with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (412, True), (360, False)])
@pytest.mark.parametrize("runs", [1, 2])
def test_drawn_without_errors_or_requests(
    make_run: Callable[..., Path], tmp_path: Path, runs: int, width: int, dark: bool
) -> None:
    run_dirs = [make_run("search", bad_losses={300: float("nan")}), make_run("fixed", adalrs=False)][:runs]
    found = look_at(write_report(run_dirs), width, dark, tmp_path)

    assert found["complaints"] == []
    assert found["requests"] == []
    plots = found["plots"]
    assert list(plots) == [f"plot-{key}" for key in PLOTS]
    assert plots["plot-loss"]["lines"] >= 2 * runs
    assert plots["plot-loss"]["points"] >= 12
    assert plots["plot-loss"]["shapes"] >= 5
    assert plots["plot-search"]["lines"] >= 2 and plots["plot-search"]["shapes"] == 5
    assert plots["plot-compute"]["lines"] >= runs
    assert plots["plot-lr"]["lines"] >= 2 * runs
    # Of 14 measurements, 4 have a verdict with a bound on both sides of the reference.
    assert plots["plot-velocity"]["errorbars"] == 14 and plots["plot-velocity"]["points"] == 14 + 2 * 4
    assert plots["plot-discarded"]["bars"] >= 3
    assert plots["plot-throughput"]["lines"] >= 2 * runs

    assert found["innerWidth"] == width
    assert found["scrollWidth"] <= width
    assert all(width * 0.75 < plot["width"] <= width for plot in plots.values())
    assert found["tableScrolls"] == (width < 1280)
    assert not found["compareScrolls"] and not found["reasonsCut"]
    assert all(plot["textColor"] == found["inkColor"] for plot in plots.values())
    lightness = int(re.findall(r"\d+", found["inkColor"])[0])
    assert (lightness > 128) == dark
