"""Every wrong model turns the verification red, by the check that is meant to; every right one leaves it green.

What is planted and what must catch it is declared in ``mutations.py``; each cell of the tables in
``docs/verification.md`` is one test here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import mutations
from mutations import BY_NAME, ONNX_SUBJECTS, SUBJECTS, Bench
from short_certificates import fewer_steps

DOCUMENT = Path(__file__).parents[2] / "docs" / "verification.md"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    mutations.forget_trace()
    with pytest.MonkeyPatch.context() as patch:
        fewer_steps(patch)
        yield Bench(tmp_path_factory.mktemp("right"))
    mutations.forget_trace()


def _copy(bench: Bench, family: str, to: str, folder: Path) -> Path:
    return Path(shutil.copytree(bench.artifact(BY_NAME[family], to), folder / "copy"))


FORMATS = [(subject.name, "torch") for subject in SUBJECTS] + [(family, "onnx") for family in ONNX_SUBJECTS]


# A fixture of the module, so that all tests of a family run in a row: the exporter keeps the trace of one model.
@pytest.fixture(scope="module", params=FORMATS, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    family, to = request.param
    return family, to


def test_an_unmutated_artifact_is_certified(bench: Bench, case: tuple[str, str]) -> None:
    subject = BY_NAME[case[0]]
    assert bench.verify(subject, bench.artifact(subject, case[1])) == "nothing"


@pytest.mark.parametrize("mutation", mutations.CAUGHT_IN_PROCESS)
def test_a_mutation_of_the_process_is_caught(
    bench: Bench, case: tuple[str, str], mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, to = case
    expected = mutations.CAUGHT_IN_PROCESS[mutation][family]
    if expected == mutations.NO_LISTS:
        pytest.skip("the configuration of this family says nothing for each layer")
    assert bench.judge_process(mutation, BY_NAME[family], to, tmp_path / "out", monkeypatch) == expected


@pytest.mark.parametrize("mutation", mutations.CAUGHT_IN_CHECKPOINT)
@pytest.mark.parametrize("family", BY_NAME)
def test_a_mutation_of_a_checkpoints_files_is_caught_and_so_it_is_with_the_digests_fixed(
    bench: Bench, family: str, mutation: str, tmp_path: Path
) -> None:
    left, fixed = (answers[family] for answers in mutations.CAUGHT_IN_CHECKPOINT[mutation])
    if left == mutations.NO_LISTS:
        pytest.skip("the configuration of this family says nothing for each layer")
    folder = _copy(bench, family, "torch", tmp_path)
    mutations.CHECKPOINT[mutation](folder, BY_NAME[family])
    assert bench.verify(BY_NAME[family], folder) == left
    mutations.fix_digests(folder)
    assert bench.verify(BY_NAME[family], folder) == ("nothing" if fixed == mutations.UNDONE else fixed)


@pytest.mark.parametrize("mutation", mutations.CAUGHT_IN_ONNX)
@pytest.mark.parametrize("family", ONNX_SUBJECTS)
def test_a_mutation_of_a_graphs_files_is_caught_and_so_it_is_with_the_digests_fixed(
    bench: Bench, family: str, mutation: str, tmp_path: Path
) -> None:
    left, fixed = mutations.CAUGHT_IN_ONNX[mutation]
    folder = _copy(bench, family, "onnx", tmp_path)
    mutations.ONNX[mutation](folder, BY_NAME[family])
    assert bench.verify(BY_NAME[family], folder) == left
    mutations.fix_digests(folder)
    assert bench.verify(BY_NAME[family], folder) == ("nothing" if fixed == mutations.UNDONE else fixed)


def test_the_document_shows_the_declared_answers() -> None:
    shown = re.search(r"<!-- answers -->\n(.*)\n<!-- end of answers -->", DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert shown is not None
    assert shown[1].strip() == mutations.tables()


def test_every_declared_mutation_is_planted_somewhere_and_no_other() -> None:
    assert mutations.CAUGHT_IN_PROCESS.keys() == mutations.PROCESS.keys()
    assert mutations.CAUGHT_IN_CHECKPOINT.keys() == mutations.CHECKPOINT.keys()
    assert mutations.CAUGHT_IN_ONNX.keys() == mutations.ONNX.keys()
    answers = {answer for row in mutations.CAUGHT_IN_PROCESS.values() for answer in row.values()}
    answers |= {answer for pair in mutations.CAUGHT_IN_CHECKPOINT.values() for row in pair for answer in row.values()}
    answers |= {answer for pair in mutations.CAUGHT_IN_ONNX.values() for answer in pair}
    known = {*mutations.REFUSALS, "numbers", "bits", mutations.NO_LISTS, mutations.UNDONE}
    assert answers <= known
    assert len(mutations.SUBJECTS) >= 5
