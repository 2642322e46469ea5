"""The page in a real browser: no sideways scrolling, no cut-off label, and a dark scheme that is really dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from report_fixtures import run_inputs
from sglp_bench.report.page import render_html
from sglp_bench.report.run_report import RunReport

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH"),
]

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip

# Headless windows have a least width, so the page is put into a frame of the width in question.  A label is cut off
# when its box leaves the coordinate system of its picture, and unreadable when it lies on another label.
_PROBE = """<!doctype html><body>
<iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe><pre id="found"></pre><script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument;
  for (const part of page.querySelectorAll("details")) part.open = true;
  const spoilt = [];
  let pictures = 0;
  for (const picture of page.querySelectorAll('svg[role="img"]')) {{
    if (!picture.getClientRects().length) continue;
    pictures += 1;
    const room = picture.viewBox.baseVal, name = picture.querySelector("title").textContent;
    const labels = [...picture.querySelectorAll("text")].map((text) => [text.textContent, text.getBBox()]);
    labels.forEach(([text, box], index) => {{
      const right = box.x + box.width, bottom = box.y + box.height;
      if (box.x < -1.5 || box.y < -1.5 || right > room.width + 1.5 || bottom > room.height + 1.5)
        spoilt.push(name + ": cut off: " + text);
      for (const [other, its] of labels.slice(index + 1)) {{
        const across = Math.min(right, its.x + its.width) - Math.max(box.x, its.x);
        const down = Math.min(bottom, its.y + its.height) - Math.max(box.y, its.y);
        if (across > 1 && down > 4) spoilt.push(name + ": " + text + " lies on " + other);
      }}
    }});
  }}
  document.getElementById("found").textContent = JSON.stringify({{
    scroll: page.scrollingElement.scrollWidth, client: page.documentElement.clientWidth, pictures, spoilt,
    text: page.body.innerText,
  }});
}});
</script></body>"""


def chromium(folder: Path, *arguments: str) -> str:
    """Run the browser once with a profile of its own; returns what it printed."""
    assert BROWSER is not None
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [BROWSER, *_FLAGS, profile, *arguments], capture_output=True, text=True, timeout=180, check=True
    )
    return done.stdout


def probe(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What the browser makes of ``page`` in a frame of ``width`` CSS pixels, every folded part open."""
    wrapper = folder / f"probe-{width}.html"
    wrapper.write_text(_PROBE.format(width=width, page=escape(page)), encoding="utf-8")
    dom = chromium(folder, "--window-size=1400,1000", "--virtual-time-budget=4000", "--dump-dom", wrapper.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found
    assert found[1], "the page did not load in time"
    return dict(json.loads(unescape(found[1])))


def first_pixel(png: Path) -> tuple[int, ...]:
    """The colour of the top left pixel; whatever filter its row uses, there is nothing before it to predict from."""
    data = png.read_bytes()
    packed, at = b"", 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + size]
        at += size + 12
    return tuple(zlib.decompress(packed)[1:4])


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(RunReport(**run_inputs()).to_json())


@pytest.mark.parametrize("width", [360, 390, 820, 1280])
def test_no_width_scrolls_sideways_or_spoils_a_label(page: str, width: int, tmp_path: Path) -> None:
    found = probe(page, width, tmp_path)
    assert found["client"] == width
    assert found["scroll"] <= width
    assert found["pictures"] == 9  # one of the two drawings of each picture
    assert found["spoilt"] == []
    assert not re.search(r"\b(undefined|NaN|None|null)\b", found["text"])


def test_long_names_and_failures_do_not_widen_a_phone_page(tmp_path: Path) -> None:
    inputs = run_inputs(parity_passed=False)
    long = "a-model-with-a-very-long-name-" * 6
    inputs["plan"]["model"]["id"] = long
    inputs["parity"]["onnx"]["reasons"] = [f"{long} differs"]
    inputs["provenance"]["command"] = f"sglp-deploy run {long}"
    for metric in inputs["comparisons"]["onnx"]["metrics"].values():
        metric["verdict"] = "inconclusive"
    found = probe(render_html(RunReport(**inputs).to_json()), 360, tmp_path)
    assert found["scroll"] <= 360
    assert found["spoilt"] == []
    assert long in found["text"].replace("\n", "")


def test_an_empty_report_fits_a_phone(tmp_path: Path) -> None:
    found = probe(render_html(RunReport(None).to_json()), 360, tmp_path)
    assert found["scroll"] <= 360
    assert "not measured" in found["text"]


def test_the_dark_scheme_is_dark_and_the_light_one_light(page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    colours = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{name}.png"
        chromium(
            tmp_path,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=800,600",
            f"--screenshot={picture}",
            (tmp_path / "report.html").as_uri(),
        )
        colours[name] = first_pixel(picture)
    assert colours == {"dark": (0x0C, 0x11, 0x18), "light": (0xF5, 0xF7, 0xFA)}
