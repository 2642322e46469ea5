"""Every wrong overlay turns the verification red, by the check that is meant to; every right one leaves it green."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mutations
import mutations_overlay
from mutations import BY_NAME, ONNX_SUBJECTS, SUBJECTS
from mutations_overlay import OverlayBench
from short_certificates import fewer_steps

DOCUMENT = Path(__file__).parents[2] / "docs" / "verification.md"
FORMATS = [(subject.name, "torch") for subject in SUBJECTS] + [(family, "onnx") for family in ONNX_SUBJECTS]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverlayBench]:
    mutations.forget_trace()
    with pytest.MonkeyPatch.context() as patch:
        fewer_steps(patch)
        yield OverlayBench(tmp_path_factory.mktemp("right"))
    mutations.forget_trace()


# A fixture of the module, so that all tests of a family run in a row: the exporter keeps the trace of one model.
@pytest.fixture(scope="module", params=FORMATS, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    family, to = request.param
    return family, to


def test_an_unmutated_artifact_with_an_overlay_is_certified(
    bench: OverlayBench, case: tuple[str, str], tmp_path: Path
) -> None:
    subject = BY_NAME[case[0]]
    assert bench.verify_from(subject, bench.copies(subject, case[1], tmp_path)) == "nothing"


@pytest.mark.parametrize("mutation", mutations_overlay.CAUGHT_IN_PROCESS)
def test_a_mutation_of_the_process_is_caught(
    bench: OverlayBench, case: tuple[str, str], mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bench.judge_process(mutation, BY_NAME[case[0]], case[1], tmp_path / "out", monkeypatch)
    assert found == mutations_overlay.CAUGHT_IN_PROCESS[mutation]


@pytest.mark.parametrize("mutation", mutations_overlay.CAUGHT_IN_FILES)
def test_a_mutation_of_the_files_is_caught_and_so_it_is_with_the_digests_fixed(
    bench: OverlayBench, case: tuple[str, str], mutation: str, tmp_path: Path
) -> None:
    subject = BY_NAME[case[0]]
    left, fixed = mutations_overlay.CAUGHT_IN_FILES[mutation]
    files = bench.copies(subject, case[1], tmp_path)
    mutations_overlay.FILES[mutation](files)
    assert bench.verify_from(subject, files) == left
    mutations.fix_digests(files.artifact)
    assert bench.verify_from(subject, files) == fixed


def test_the_document_shows_the_declared_answers() -> None:
    shown = re.search(r"<!-- overlays -->\n(.*)\n<!-- end of overlays -->", DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert shown is not None
    assert shown[1].strip() == mutations_overlay.table()


def test_every_declared_mutation_is_planted_somewhere_and_no_other() -> None:
    assert mutations_overlay.CAUGHT_IN_PROCESS.keys() == mutations_overlay.PROCESS.keys()
    assert mutations_overlay.CAUGHT_IN_FILES.keys() == mutations_overlay.FILES.keys()
    answers = {answer for pair in mutations_overlay.CAUGHT_IN_FILES.values() for answer in pair}
    assert answers <= {*mutations_overlay.REFUSALS, *mutations.REFUSALS, "numbers"}
