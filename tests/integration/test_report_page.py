"""The report's page in a real browser: no error, no request, every picture there, readable on small and wide screens."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
REQUIRED = os.environ.get("AUTOSEG_REQUIRE_BROWSER") == "1"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)
SECONDS = 60
LAYOUT = """
const width = document.documentElement.clientWidth;
const outside = [...document.querySelectorAll('main *, header *')].filter(e =>
  e.getBoundingClientRect().right > width + 1 && !e.closest('.scroll, svg, nav')).map(e => e.outerHTML.slice(0, 120));
return {
  width, scroll: document.documentElement.scrollWidth, outside,
  images: document.images.length, broken: [...document.images].filter(i => !i.naturalWidth || !i.alt).length,
  charts: document.querySelectorAll('.charts svg').length,
  small: [...document.querySelectorAll('p, td, th, dd, li')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).length,
  background: getComputedStyle(document.body).backgroundColor,
};
"""


class Browser:
    """Chromium without a window, driven over HTTP."""

    def __init__(self, profile: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        self._wait()
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.base += "/session/" + self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _wait(self) -> None:
        limit = time.monotonic() + SECONDS
        while time.monotonic() < limit:
            try:
                self.ask("GET", "/status")
                return
            except OSError:
                time.sleep(0.05)
        pytest.fail("chromedriver does not answer")

    def ask(self, method: str, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def command(self, name: str, **values: Any) -> Any:
        return self.ask("POST", "/goog/cdp/execute", {"cmd": name, "params": values})

    def run(self, code: str) -> Any:
        return self.ask("POST", "/execute/sync", {"script": code, "args": []})

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.ask("POST", "/se/log", {"type": kind})

    def look(self, page: Path, width: int, scheme: str = "light") -> dict[str, Any]:
        """Open a page at a width; returns what LAYOUT measures, with all folded parts opened."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for kind in ("browser", "performance"):  # what was there before
            self.log(kind)
        self.open(page.as_uri())
        self.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        return self.run(LAYOUT)

    def requests(self) -> list[str]:
        """Everything that was asked for since the last look, other than what pages hold themselves."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(SECONDS)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests here."""
    if CHROMIUM is None or DRIVER is None:
        message = "needs Debian's packages chromium and chromium-driver"
        if REQUIRED:
            pytest.fail(message)
        pytest.skip(message)
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def work(trained: Path, cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained folder with a diagnosis and its report."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.diagnose import diagnose
    from autoseg.stages.report import report

    work = cli.copied(trained, tmp_path_factory.mktemp("reported") / "work")
    with pytest.MonkeyPatch.context() as patch:  # figures of few pixels are drawn faster
        patch.setattr("autoseg.stages.report_pictures.DPI", 40)
        patch.setattr("autoseg.stages.report_overlays.PAPER_DPI", 40)
        diagnose(Workspace(work), threads=1)
        report(Workspace(work))
    return work


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_whole_and_readable(browser: Browser, work: Path, width: int, scheme: str) -> None:
    page = work / "report" / "index.html"
    found = browser.look(page, width, scheme)
    assert found["width"] == width and found["scroll"] <= width, found
    assert found["outside"] == [] and found["small"] == 0
    assert found["images"] >= 6 and found["broken"] == 0 and found["charts"] >= 6
    assert (found["background"] == "rgb(13, 17, 23)") == (scheme == "dark")
    assert browser.requests() == [page.as_uri()]
    assert browser.log("browser") == []


def test_outlines_can_be_hidden(browser: Browser, work: Path) -> None:
    browser.look(work / "report" / "index.html", 1000)
    shown = "return [...document.querySelectorAll('.prediction')].filter(e => getComputedStyle(e).display !== 'none').length"
    before = browser.run(shown)
    browser.run("document.getElementById('show-prediction').click()")
    assert before > 0 and browser.run(shown) == 0


def test_the_printed_page_is_white_and_without_navigation(browser: Browser, work: Path) -> None:
    browser.look(work / "report" / "index.html", 1000)
    browser.command("Emulation.setEmulatedMedia", media="print")
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.command("Emulation.setEmulatedMedia", media="")


def test_names_that_look_like_code_stay_names(browser: Browser, tmp_path: Path) -> None:
    from autoseg.stages import report_results as results
    from autoseg.stages.report_page import Page, render
    from autoseg.stages.report_pictures import COLOURS_OF_PAGE
    from autoseg.types.report import CaseMetrics, Report

    name = "<img src=x onerror=document.title='run'>" * 4
    found = Report.of([CaseMetrics(case=f"{name}{i}", metrics={name: {"dice": 0.2 * i}}) for i in range(5)])
    section, _ = results.results(found, "")
    path = tmp_path / "index.html"
    path.write_text(render(Page("names", results.headline(found, True), [name], results.tiles(found), [section], [(name, name)],
                                "", COLOURS_OF_PAGE)))
    seen = browser.look(path, 400)
    assert seen["scroll"] <= 400 and seen["images"] == 0 and browser.run("return document.title") == "names"
    assert browser.log("browser") == [] and browser.requests() == [path.as_uri()]


def test_the_work_folder_keeps_its_records(work: Path, trained: Path) -> None:
    text = (work / "report" / "index.html").read_text()
    assert (work / "report" / "report.json").read_text() == (trained / "report" / "report.json").read_text()
    assert (work / "report" / "report.csv").read_text().startswith("case,patient,fold,label,metric,value")
    assert len(text) < 5_000_000
    parts = ("Results", "Worst, median and best cases", "Diagnosis", "What was selected", "Data", "Plan", "Training")
    for part in parts:
        assert f">{part}" in text
    assert {"results.png", "cases.png", "data.png", "training.png"} <= {p.name for p in (work / "report" / "figures").iterdir()}


def test_a_work_folder_is_compared_with_masks_of_another_tool(trained: Path, tmp_path: Path) -> None:
    from autoseg.stages.compare import compare

    masks = tmp_path / "theirs"
    for path in trained.glob("runs/3d_fullres/fold_*/validation/*.nii.gz"):
        masks.mkdir(exist_ok=True)
        shutil.copy(path, masks)
    found = compare([trained, f"run={trained / 'runs' / '3d_fullres'}", masks], out=tmp_path / "out", threads=1)
    assert [one.name for one in found.contenders] == ["work", "run", "theirs"] and len(found.cases) == len(list(masks.iterdir()))
    assert all(d.mean == 0 for d in found.differences if {d.first, d.second} == {"run", "theirs"} and d.mean is not None)
