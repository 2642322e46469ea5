"""Photograph the top of a run's report for the README: ``python docs/pictures/make_report_picture.py [RUN_FOLDER]``.

The report is rendered again from the files of the run folder, which stays as it is.  Chromium must be on PATH.  Pillow,
where it is installed, reduces the picture to 256 colours, a third of the size.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sglp_bench import RunReport

WIDTH = 1200
MARGIN = 14  # below the last pictures shown; the next panel begins 18 further down
MOST_BYTES = 200_000  # a README is loaded on phones
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
    "--no-first-run", "--disable-sync", "--blink-settings=preferredColorScheme=1",
]  # fmt: skip
_MEASURE = (
    "<script>const last = document.querySelector('#plan .grid');"
    "if (last) document.body.dataset.end = Math.ceil(last.getBoundingClientRect().bottom);</script></body>"
)


def browse(folder: Path, *arguments: str) -> str:
    """Run the browser once, with a profile of its own in ``folder``; returns what it printed."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise SystemExit("no browser was found; the picture is a screenshot; install chromium")
    command = [browser, *_FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def end_of_top(page: Path) -> int:
    """Where the first row of pictures under the cards ends, in pixels from the top."""
    measured = page.with_name("measured.html")  # a copy: the report itself has no script
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", _MEASURE), encoding="utf-8")
    shown = browse(page.parent, f"--window-size={WIDTH},1000", "--dump-dom", measured.as_uri())
    found = re.search(r'data-end="(\d+)"', shown)
    if found is None:
        raise SystemExit("the report shows no plan; its folder holds no plan.json; name the folder of a finished run")
    return int(found[1])


def reduce_colours(picture: Path) -> None:
    """Write ``picture`` again with a palette of 256 colours."""
    from PIL import Image

    with Image.open(picture) as image:
        reduced = image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced.save(picture, optimize=True)


def main() -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_folder", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("report.png"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        page = RunReport.from_run_folder(given.run_folder).save(folder)
        made = folder / "report.png"
        size = f"--window-size={WIDTH},{end_of_top(page) + MARGIN}"
        browse(folder, size, f"--screenshot={made}", page.as_uri())
        if find_spec("PIL"):
            reduce_colours(made)
        if (found := made.stat().st_size) > MOST_BYTES:
            raise SystemExit(f"the picture has {found} bytes; at most {MOST_BYTES} are wanted; install Pillow")
        given.to.write_bytes(made.read_bytes())
    print(f"{given.to}: {found} bytes")


if __name__ == "__main__":
    main()
