"""The page's templates: the engine escapes, no template takes that back, and nothing loads the engine too early."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from report_fixtures import run_inputs
from sglp_bench.report.page import render_html
from sglp_bench.report.run_report import RunReport

TEMPLATES = resources.files("sglp_bench.report").joinpath("templates")
NAMES = sorted(entry.name for entry in TEMPLATES.iterdir() if entry.name.endswith(".jinja"))


def test_there_is_a_template_for_each_section_of_the_page() -> None:
    page = render_html(RunReport(**run_inputs()).to_json())
    sections = re.findall(r'<section id="(\w+)">', page)
    assert sections == ["plan", "parity", "speed", "memory", "quality", "provenance"]
    assert {f"{section}.html.jinja" for section in sections} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_template_takes_escaping_back(name: str) -> None:
    source = TEMPLATES.joinpath(name).read_text(encoding="utf-8")
    assert not re.search(r"\|\s*safe\b|\bautoescape\b|<script|\bstyle=|\bon\w+=", source)


def test_the_style_sheet_is_on_the_page_as_it_is_in_its_file() -> None:
    style = TEMPLATES.joinpath("report.css").read_text(encoding="utf-8")
    assert f"<style>\n{style}</style>" in render_html(RunReport(None).to_json())


def test_a_value_in_a_card_a_claim_a_cell_and_an_attribute_is_escaped_once() -> None:
    report = RunReport(**run_inputs()).to_json()
    mark = '<b class="x">&amp;\''
    report["cards"][0] |= {"value": mark, "state": mark}
    report["claims"][0]["sentence"] = mark
    report["measurements"][0]["baseline"] = mark  # a column of a table, and so a part of its label
    page = render_html(report)
    assert "<b " not in page
    escaped = "&lt;b class=&#34;x&#34;&gt;&amp;amp;&#39;"
    assert f'<div class="card {escaped}">' in page
    assert f'<div class="value">{escaped}</div>' in page
    assert f"<p>{escaped}</p>" in page
    assert f">{escaped}</th>" in page
    assert f'aria-label="table: metric, {escaped}, pruned, ' in page


def test_the_template_engine_is_loaded_only_where_a_page_is_made(tmp_path: Path) -> None:
    code = (
        "import sys, sglp_bench, sglp_bench.measure.worker, sglp_bench.report.run_report as made\n"
        "sglp_bench.RunReport(None).to_json()\n"
        "assert not {'jinja2', 'markupsafe', 'torch'} & set(sys.modules), 'early'\n"
        "made.RunReport(None).save(sys.argv[1])\n"
        "assert 'jinja2' in sys.modules and 'torch' not in sys.modules, 'late'\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
