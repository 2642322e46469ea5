"""``run``: the layout, what a second run does not do again, what heals, and what a stop in the middle leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import cli_runs
from sglp_bench.devices.environment import collect_environment
from sglp_bench.report.run_report import RunReport
from sglp_deploy import _io
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli import ledger, pipeline, session
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.plan import PruningPlan

BOTH = [
    "plan",
    "checkpoint",
    "export onnx",
    "export onnx-baseline",
    "export vllm",
    "parity torch",
    "parity onnx",
    "parity onnx-baseline",
    "parity vllm",
    "quality",
    "bench",
    "report",
]
VLLM = ["plan", "checkpoint", "export vllm", "parity vllm", "quality", "report"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of a finished run of ``--to onnx,vllm``."""
    return Path(shutil.copytree(cli_runs.finished_run(tmp_path_factory), tmp_path / "demo"))


@pytest.fixture(autouse=True)
def _planted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_runs.quick(monkeypatch)


def again(model: Path, run: Path, *more: str, code: int = 0, to: str = "onnx,vllm", drop: str = "2") -> list[str]:
    """Run into ``run``; returns the stages that were not kept, in order."""
    assert main(cli_runs.run_arguments(model, run, *more, to=to, drop=drop)) == code
    return [name for name, stage in stages(run).items() if stage["note"] != "kept"]


def stages(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text())["stages"])


def files(run: Path) -> set[str]:
    return {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}


def leftovers(root: Path) -> list[Path]:
    return [path for pattern in ("*.partial", "*.old", "*.tmp") for path in root.rglob(pattern)]


# ---------------------------------------------------------------------------------------------------- layout and words


def test_a_run_folder_has_the_documented_layout(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "artifacts", "bench", "checkpoint", "parity", "plan.json", "quality.json", "report", "run.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "artifacts").iterdir()) == ["onnx", "onnx-baseline", "vllm"]
    assert sorted(path.name for path in (run / "parity").iterdir()) == [
        "onnx-baseline.json", "onnx.json", "torch.json", "vllm.json",
    ]  # fmt: skip
    for name in ("onnx", "onnx-against-torch"):
        assert sorted(path.name for path in (run / "bench" / name).iterdir()) == ["comparison.json", "result.json"]
    assert sorted(path.name for path in (run / "report").iterdir()) == ["report.html", "report.json"]
    assert list(stages(run)) == BOTH
    assert {stage["state"] for stage in stages(run).values()} == {"done"}


def test_the_files_of_a_run_agree_with_each_other(run: Path, model: Path) -> None:
    plan = PruningPlan.load(run / "plan.json")
    for name, depth in (
        ("artifacts/onnx", 4),
        ("artifacts/onnx-baseline", 6),
        ("artifacts/vllm", 4),
        ("checkpoint", 4),
    ):
        artifact = ExportArtifact.load(run / name)
        assert artifact.n_layers == depth
        if depth == 4:
            assert artifact.plan_digest == plan.digest()
        if name.startswith("artifacts/"):
            certificate = json.loads((run / "parity" / f"{artifact.path.name}.json").read_text())
            assert certificate["artifact_digest"] == artifact.digest
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["title"] == "llama: 6 to 4 layers"
    assert report["provenance"]["command"].startswith(f"sglp-deploy run {model} --drop 2 --to onnx,vllm")
    assert report["provenance"]["seed"] == 0
    assert [item["name"] for item in report["measurements"]] == ["onnx", "onnx-against-torch"]


def test_the_end_of_a_run_is_a_short_table_and_the_path_of_the_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*cli_runs.run_arguments(model, tmp_path / "demo", to="vllm"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *rows, last = out.splitlines()
    page = tmp_path / "demo" / "report" / "report.html"
    assert [row.split("  ")[0] for row in rows] == ["layers", "parity vllm", "perplexity", "checkpoint", "report"]
    assert rows[0].split() == ["layers", "6", "->", "4"]
    assert rows[-1].split() == ["report", str(page)]
    assert json.loads(last)["report"] == str(page)
    assert json.loads(last)["exit_code"] == 0
    assert page.is_file()


def test_progress_names_every_stage_on_stderr(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [item for item in cli_runs.run_arguments(model, tmp_path / "demo", to="vllm") if item != "-q"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "..." not in out
    for stage in VLLM:
        assert f"{stage} ..." in err
        assert f"{stage}: done in" in err
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert err.splitlines() == [f"{stage}: kept, its inputs have not changed" for stage in VLLM]


# ------------------------------------------------------------------------------------------------- what is done again


def test_a_second_run_keeps_every_stage_and_touches_no_model(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a run with nothing to do did some work")

    monkeypatch.setattr(session, "compressor", forbidden)
    monkeypatch.setattr(pipeline, "run_arms", forbidden)
    monkeypatch.setattr(RunReport, "save", forbidden)
    before = {name: (run / name).stat().st_mtime_ns for name in files(run) - {"run.json", ".lock"}}
    assert again(model, run) == []
    assert {name: (run / name).stat().st_mtime_ns for name in before} == before
    assert files(run) == before.keys() | {"run.json", ".lock"}


def test_a_run_with_nothing_to_do_does_not_import_torch(run: Path, model: Path) -> None:
    code = (
        "import sys\nfrom sglp_deploy.cli.main import main\n"
        f"assert main({cli_runs.run_arguments(model, run)!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli_runs.environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_another_budget_runs_everything_that_depends_on_the_plan(run: Path, model: Path) -> None:
    """The baseline keeps every layer under any plan, so neither it nor its certificate is made again."""
    assert again(model, run, drop="1") == [
        stage for stage in BOTH if stage not in ("export onnx-baseline", "parity onnx-baseline")
    ]
    assert ExportArtifact.load(run / "artifacts" / "onnx").n_layers == 5
    assert json.loads((run / "report" / "report.json").read_text())["title"] == "llama: 6 to 5 layers"


def test_another_text_runs_parity_quality_and_report_only(run: Path, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The cat sat on the mat, and the dog did not mind it at all. " * 20)
    judged = ["parity torch", "parity onnx", "parity onnx-baseline", "parity vllm", "quality", "report"]
    assert again(model, run, "--text", str(text)) == judged
    assert again(model, run, "--text", str(text)) == []
    # The content decides, not the name.
    text.rename(tmp_path / "renamed.txt")
    assert again(model, run, "--text", str(tmp_path / "renamed.txt")) == []
    (tmp_path / "renamed.txt").write_text("Something else stands here now, and it is long enough to be measured. " * 20)
    assert again(model, run, "--text", str(tmp_path / "renamed.txt")) == judged


def test_another_workload_runs_the_benchmark_and_the_report_only(run: Path, model: Path) -> None:
    assert again(model, run, "--workload", "demo") == ["bench", "report"]


def test_a_result_measured_on_another_machine_is_measured_again(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = collect_environment() | {"cpu_model": "another"}
    monkeypatch.setattr(pipeline, "collect_environment", lambda **options: elsewhere)
    assert again(model, run) == ["bench"]  # and the planted times come out the same, so the report stands


@pytest.mark.parametrize("what", ["dtype", "version", "model"])
def test_what_decides_every_result_runs_everything(
    what: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(model, tmp_path / "llama"))
    assert again(own, tmp_path / "demo", to="vllm") == VLLM
    more = []
    if what == "dtype":
        more = ["--dtype", "bf16"]
    elif what == "version":
        monkeypatch.setattr(pipeline, "__version__", "99.0")
    else:
        config = json.loads((own / "generation_config.json").read_text())
        (own / "generation_config.json").write_text(json.dumps(config | {"top_k": 12}))
    assert "export vllm" in again(own, tmp_path / "demo", *more, to="vllm")
    ran = [name for name, stage in stages(tmp_path / "demo").items() if stage["note"] != "kept"]
    # The report shows what the others found; it is written again only when they found something else.
    assert ran[:-1] == VLLM[:-1] if what == "dtype" else set(ran) >= set(VLLM) - {"report"}
    if what == "dtype":
        assert ExportArtifact.load(tmp_path / "demo" / "checkpoint").precision == "bf16"


def test_calibration_settings_decide_the_plan(run: Path, model: Path) -> None:
    ran = again(model, run, "--calibration-tokens", "200")
    assert ran[:1] == ["plan"]
    assert PruningPlan.load(run / "plan.json").calibration is not None
    assert again(model, run, "--calibration-tokens", "200", "--calibration", "builtin") == []  # the same by its name


# -------------------------------------------------------------------------------------------------------------- healing


def _delete(path: Path) -> None:
    path.unlink()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_delete, _flip])
@pytest.mark.parametrize(
    ("file", "ran"),
    [
        ("artifacts/vllm/model.safetensors", ["export vllm"]),
        ("artifacts/onnx/model.onnx.data", ["export onnx"]),
        ("artifacts/onnx/manifest.json", ["export onnx"]),
        ("checkpoint/config.json", ["checkpoint"]),
        ("quality.json", ["quality"]),
        ("report/report.html", ["report"]),
        ("parity/vllm.json", ["parity vllm"]),
        ("bench/onnx-against-torch/comparison.json", ["bench"]),
    ],
)
def test_a_damaged_output_is_made_again_and_what_came_out_the_same_is_not(
    damage: Callable[[Path], None], file: str, ran: list[str], run: Path, model: Path
) -> None:
    before = (run / file).read_bytes()
    damage(run / file)
    assert again(model, run) == ran
    if ran != ["report"]:  # the page says when it was made
        assert (run / file).read_bytes() == before
    assert again(model, run) == []


@pytest.mark.parametrize("damage", [_delete, _flip])
def test_a_damaged_plan_is_made_again_and_holds_for_what_was_made_from_it(
    damage: Callable[[Path], None], run: Path, model: Path
) -> None:
    before = PruningPlan.load(run / "plan.json").digest()
    damage(run / "plan.json")
    assert again(model, run) == ["plan"]
    assert PruningPlan.load(run / "plan.json").digest() == before


def test_an_artifact_that_comes_out_different_runs_what_depends_on_it(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Compressor.export

    def other(self: Compressor, plan: PruningPlan, to: str, out_dir: str | Path, **options: Any) -> ExportArtifact:
        made = real(self, plan, to, out_dir, **options)
        manifest = json.loads((made.path / "manifest.json").read_text())
        manifest["details"]["remark"] = "another build"
        _io.write_json(made.path / "manifest.json", manifest)
        return ExportArtifact.load(out_dir)

    monkeypatch.setattr(Compressor, "export", other)
    (run / "artifacts" / "onnx" / "model.onnx").unlink()
    assert again(model, run) == ["export onnx", "parity onnx", "bench", "report"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"schema": "run/9", "stages": {}}', '{"schema": "run/1"}', '{"schema": "run/1", "stages": []}',
     '{"schema": "run/1", "stages": {"plan": {"key": 1}}}',
     '{"schema": "run/1", "stages": {"plan": {"key": "k", "state": "done", "outputs": 3}}}'],
)  # fmt: skip
def test_a_run_file_that_cannot_be_trusted_is_not_believed(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    assert ledger.read_stages(tmp_path) == {}


def test_a_run_file_that_cannot_be_read_is_set_aside_by_name_and_everything_runs_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = tmp_path / "demo"
    assert again(model, demo, to="vllm") == VLLM
    (demo / "run.json").write_text('{"schema": "run/2", "stages": ')
    capsys.readouterr()
    assert main([item for item in cli_runs.run_arguments(model, demo, to="vllm") if item != "-q"]) == 0
    assert "run.json cannot be read; kept as run.json.unreadable, and every stage runs" in capsys.readouterr().err
    assert (demo / "run.json.unreadable").read_text() == '{"schema": "run/2", "stages": '
    assert all(stage["note"] != "kept" for stage in stages(demo).values())


def test_without_its_run_file_a_folder_is_run_from_the_start(model: Path, tmp_path: Path) -> None:
    assert again(model, tmp_path / "demo", to="vllm") == VLLM
    (tmp_path / "demo" / "run.json").unlink()
    assert again(model, tmp_path / "demo", to="vllm") == VLLM


def test_what_an_earlier_run_made_and_this_one_does_not_is_removed_from_the_report(
    run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = run / "artifacts" / "notes"
    mine.mkdir()
    (mine / "todo.txt").write_text("mine")
    assert main([item for item in cli_runs.run_arguments(model, run, to="vllm") if item != "-q"]) == 0
    err = capsys.readouterr().err
    gone = ["artifacts/onnx", "artifacts/onnx-baseline", "parity/onnx.json", "bench/onnx/comparison.json"]
    gone += ["bench/onnx/result.json", "bench/onnx-against-torch/result.json"]
    for path in gone:
        assert f"removed {path}: an earlier run made it, this one does not" in err
        assert not (run / path).exists()
    assert (mine / "todo.txt").read_text() == "mine"
    report = json.loads((run / "report" / "report.json").read_text())
    assert {item["name"] for item in report["artifacts"]} <= {"checkpoint", "vllm"}
    assert report["measurements"] == []
    assert list(stages(run)) == VLLM


def test_an_artifact_somebody_has_changed_is_set_aside_and_made_again(
    run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoint" / "config.json").write_text("edited")
    (run / "artifacts" / "onnx" / "NOTES.md").write_text("mine")  # an earlier run's, of which this one makes none
    (run / "parity" / "onnx.json").write_text('{"schema": "par')  # would stop every report
    site = run / "artifacts" / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "a web application", "schema": "site/2"}')
    for number in ("", "-2"):
        arguments = [item for item in cli_runs.run_arguments(model, run, to="vllm") if item != "-q"]
        assert main(arguments) == 0
        err = capsys.readouterr().err
        assert f"moved checkpoint to aside/checkpoint{number}: somebody has changed it since it was written" in err
        assert (run / "aside" / f"checkpoint{number}" / "config.json").read_text() == "edited"
        assert json.loads((run / "checkpoint" / "config.json").read_text())["num_hidden_layers"] == 4
        (run / "checkpoint" / "config.json").write_text("edited")
    assert (run / "aside" / "parity" / "onnx.json").read_text() == '{"schema": "par'
    assert (run / "aside" / "artifacts" / "onnx" / "NOTES.md").read_text() == "mine"
    assert not (run / "artifacts" / "onnx").exists()
    assert [file.name for file in site.iterdir()] == ["manifest.json"]


# ------------------------------------------------------------------------------------------------------------- failing


def test_failed_parity_withholds_the_benchmark_and_exits_3(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Compressor.verify

    def doubtful(self: Compressor, artifact: ExportArtifact, *arguments: Any, **options: Any) -> Any:
        report = real(self, artifact, *arguments, **options)
        return replace(report, reasons=("planted",)) if artifact.path.name == "onnx" else report

    monkeypatch.setattr(Compressor, "verify", doubtful)
    (run / "parity" / "onnx.json").unlink()
    assert again(model, run, code=3) == ["parity onnx", "report"]
    captured = capsys.readouterr()
    assert captured.err == "warning: onnx is not measured; parity of onnx failed; see parity/onnx.json\n"
    assert "FAILED" in captured.out
    assert not list((run / "bench").glob("*/comparison.json"))  # the speed of a wrong artifact is no speed
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["measurements"] == []
    # It stays failed until something changes, and is not forgotten by the next run.
    assert again(model, run, code=3) == []


def test_a_checkpoint_that_is_not_certified_is_timed_against_nothing(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((run / "bench" / "onnx" / "result.json").read_text())
    assert {arm["artifact"]["certificate"]["state"] for arm in result["arms"].values()} == {"passed"}
    real = Compressor.verify

    def doubtful(self: Compressor, artifact: ExportArtifact, *arguments: Any, **options: Any) -> Any:
        report = real(self, artifact, *arguments, **options)
        return replace(report, reasons=("planted",)) if artifact.path.name == "checkpoint" else report

    monkeypatch.setattr(Compressor, "verify", doubtful)
    (run / "parity" / "torch.json").unlink()
    assert again(model, run, code=3) == ["parity torch", "bench", "report"]
    words = "warning: nothing is compared with PyTorch eager; the checkpoint is not certified\n"
    assert capsys.readouterr().err == words
    assert [path.parent.name for path in (run / "bench").glob("*/comparison.json")] == ["onnx"]


def test_torch_is_measured_against_its_own_baseline(model: Path, tmp_path: Path) -> None:
    ran = again(model, tmp_path / "demo", to="torch,vllm")
    assert ran == [
        "plan", "checkpoint", "export vllm", "export torch-baseline", "parity torch", "parity vllm",
        "parity torch-baseline", "quality", "bench", "report",
    ]  # fmt: skip
    comparison = json.loads((tmp_path / "demo" / "bench" / "torch" / "comparison.json").read_text())
    assert (comparison["baseline"], comparison["candidate"]) == ("torch-baseline", "torch")


def test_a_missing_text_is_refused_before_any_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--text", "--calibration"):
        assert main(cli_runs.run_arguments(model, tmp_path / "demo", flag, str(tmp_path / "no.txt"))) == 1
        err = capsys.readouterr().err
        assert err == (
            f"error: calibration text {tmp_path / 'no.txt'} cannot be read; No such file or directory; check the path\n"
        )
    assert not (tmp_path / "demo").exists()


def test_weights_a_format_cannot_run_are_refused_before_the_plan(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(model), "--drop", "2", "--to", "vllm,onnx", "--dtype", "bf16", "-o", str(tmp_path / "demo")]
    assert main(arguments) == 1
    assert "error: the weights are bfloat16; ONNX Runtime lacks kernels" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "plan.json").exists()


def test_a_second_run_in_the_same_folder_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ledger.run_folder(tmp_path / "demo"):
        assert main(cli_runs.run_arguments(model, tmp_path / "demo", to="vllm")) == 1
        err = capsys.readouterr().err
        assert err == (
            f"error: another run is writing to {tmp_path / 'demo'}; two would mix their files; wait for it, or choose "
            "another --output\n"
        )
        assert files(tmp_path / "demo") == {".lock"}
    assert again(model, tmp_path / "demo", to="vllm") == VLLM


# ------------------------------------------------------------------------------------------------ stopped in the middle


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A third party's exporter and planner that wait in the middle of their work until a file called ``go`` exists."""
    site = tmp_path / "site"
    (site / "slowpoke-1.0.dist-info").mkdir(parents=True)
    (site / "slowpoke-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: slowpoke\nVersion: 1.0\n")
    (site / "slowpoke-1.0.dist-info" / "entry_points.txt").write_text(
        "[sglp_deploy.exporters]\nslowpoke = slowpoke:Exporter\n[sglp_deploy.planners]\nslowpoke = slowpoke:Planner\n"
    )
    (site / "slowpoke.py").write_text(
        "import pathlib, time\n"
        "from sglp_deploy import _io\n"
        "from sglp_exporters.checkpoint.exporter import TorchExporter\n"
        "here = pathlib.Path(__file__).parent\n"
        "def wait():\n"
        "    (here / 'waiting').touch()\n"
        "    while not (here / 'go').exists():\n"
        "        time.sleep(0.05)\n"
        "class Exporter(TorchExporter):\n"
        "    name = 'slowpoke'\n"
        "    def export(self, model, out_dir, **options):\n"
        "        with _io.staged_directory(out_dir) as folder:\n"
        "            (folder / 'half').write_text('half')\n"
        "            wait()\n"
        "            _io.write_file_list(folder)\n"
        "        return super().export(model, out_dir, **options)\n"
        "from sglp_deploy.planners.sglp import SglpPlanner\n"
        "class Planner(SglpPlanner):\n"
        "    name = 'slowpoke'\n"
        "    def decide(self, evidence, budget, options):\n"
        "        wait()\n"
        "        return super().decide(evidence, budget, options)\n"
    )
    monkeypatch.syspath_prepend(str(site))
    return site


def _start(arguments: list[str], *paths: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sglp_deploy", *arguments],
        env=cli_runs.environment(*paths),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait for ``condition``; a process that ends first fails the test with what it said."""
    while not condition():
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "to", "method", "before"),
    [
        (signal.SIGKILL, "slowpoke", "sglp", {"plan", "checkpoint"}),
        (signal.SIGTERM, "slowpoke", "sglp", {"plan", "checkpoint"}),
        (signal.SIGINT, "vllm", "slowpoke", set()),
    ],
)
def test_a_run_that_is_stopped_leaves_nothing_half_made_and_goes_on(
    number: signal.Signals, to: str, method: str, before: set[str], slow: Path, model: Path, tmp_path: Path
) -> None:
    demo = tmp_path / "demo"
    process = _start(cli_runs.run_arguments(model, demo, "--method", method, to=to), slow)
    _until((slow / "waiting").exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == ""
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert any(path.name.endswith(".partial") for path in leftovers(demo))  # nobody could clear up
    else:
        assert process.returncode == 130
        assert err == "interrupted; finished stages are kept; run the same command again to go on\n"
        assert leftovers(demo) == []
    assert {name for name, stage in stages(demo).items() if stage["state"] == "done"} == before
    assert not list(demo.glob("artifacts/[!.]*"))

    (slow / "go").touch()
    assert set(again(model, demo, "--method", method, to=to)).isdisjoint(before)
    assert leftovers(demo) == []
    assert {stage["state"] for stage in stages(demo).values()} == {"done"}


def test_a_stopped_benchmark_takes_its_workers_along(model: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    again(model, demo, to="torch")
    (demo / "bench" / "torch" / "result.json").unlink()
    process = _start(cli_runs.run_arguments(model, demo, to="torch"))
    parent = psutil.Process(process.pid)
    _until(lambda: parent.children(recursive=True), process)
    workers = parent.children(recursive=True)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; finished stages are kept; run the same command again to go on\n"
    _, alive = psutil.wait_procs(workers, timeout=30)  # one that had only just begun sees our end by itself
    assert alive == []
    assert stages(demo)["bench"]["state"] == "running"
    assert leftovers(demo) == []
    assert again(model, demo, to="torch") == ["bench"]  # planted times again, so the report stands
    assert not (demo / "bench" / "all").exists()


# --------------------------------------------------------------------------------------- a disk that is full or closed


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_when_there_is_room(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses every fsync below ``artifacts``, as a full disk may do as late as that."""
    real = os.fsync

    def full(handle: int) -> None:
        if "artifacts" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    old = ExportArtifact.load(run / "artifacts" / "vllm").digest
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(cli_runs.run_arguments(model, run, drop="1", to="vllm")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: cannot write {run / 'artifacts'}")
    assert err.endswith("; no space left on the device; free some space and run the same command again\n")
    assert ExportArtifact.load(run / "artifacts" / "vllm").digest == old
    assert leftovers(run) == []
    assert again(model, run, drop="1", to="vllm") == ["export vllm", "parity vllm", "quality", "report"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB; the tiny checkpoint needs more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_no_half_artifact(
    small_disk: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = small_disk / "demo"
    assert main(cli_runs.run_arguments(model, demo, to="vllm")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: cannot write {demo / 'checkpoint'}; no space left on the device; free some space and run the same "
        "command again\n"
    )
    assert leftovers(demo) == []
    assert not (demo / "checkpoint").exists()
    _remount(small_disk, "size=20m")
    assert again(model, demo, to="vllm") == VLLM[1:]  # the plan was kept


def test_an_onnx_export_onto_a_full_disk_keeps_the_older_artifact(
    small_disk: Path, run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _remount(small_disk, "size=20m")
    onnx = Path(shutil.copytree(run / "artifacts" / "onnx", small_disk / "onnx"))
    used = psutil.disk_usage(str(small_disk)).used
    _remount(small_disk, f"size={used // 1024 + 200}k")
    old = ExportArtifact.load(onnx).digest
    assert main(["export", str(model), "--baseline", "--to", "onnx", "-q", "-o", str(onnx)]) == 1
    err = capsys.readouterr().err
    assert err == (
        f"error: cannot write {onnx}; no space left on the device; free some space and run the same command again\n"
    )
    assert ExportArtifact.load(onnx).digest == old
    assert leftovers(small_disk) == []


def test_a_read_only_folder_is_refused_before_the_model_is_read(
    small_disk: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "demo").mkdir()
    _remount(small_disk, "ro")
    for arguments in (
        cli_runs.run_arguments(Path("/nowhere/model"), small_disk / "demo"),
        cli_runs.run_arguments(Path("/nowhere/model"), small_disk / "new"),
        ["plan", "/nowhere/model", "--drop", "1", "-q", "-o", str(small_disk / "plan.json")],
        ["materialize", "/nowhere/model", str(run / "plan.json"), "-q", "-o", str(small_disk / "smaller")],
        ["bench", str(run / "artifacts" / "vllm"), "-q", "-o", str(small_disk / "bench")],
    ):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith(f"error: cannot write {small_disk}")
        assert "read-only" in err.lower()
