"""The command line as a user meets it: every verb, every refusal in one line, and nothing else on standard output."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli_runs
import tiny
from bench_fakes import fake_artifact
from sglp_deploy import __version__, _io
from sglp_deploy._names import at_home
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli import session
from sglp_deploy.cli.config import RunConfig
from sglp_deploy.cli.console import Console
from sglp_deploy.cli.main import main
from sglp_deploy.plan import PruningPlan
from sglp_exporters.onnx.exporter import OnnxExporter

VERBS = (
    "plan",
    "repair",
    "materialize",
    "export",
    "verify",
    "bench",
    "evaluate",
    "report",
    "run",
    "show",
    "plugins",
    "doctor",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.finished_run(tmp_path_factory)


@pytest.fixture
def artifact(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "artifacts" / "vllm", tmp_path / "vllm"))


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """Run quietly with ``--json``; nothing may be on standard error and the last line must be JSON."""
    assert main([str(item) for item in arguments] + ["-q", "--json"]) == code
    out, err = capsys.readouterr()
    assert err == ""
    *text, last = out.splitlines()
    assert text
    return json.loads(last)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """Run into an error: one line on standard error with its three parts, nothing on standard output."""
    assert main([str(item) for item in arguments] + ["-q"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert err.count(";") >= 2, f"what; why; what next: {err}"
    return err


# --------------------------------------------------------------------------------------------------- help and versions


def test_help_and_version_load_no_library() -> None:
    cases = [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), [], ["nonsense"]]
    code = (
        "import sys\nfrom sglp_deploy.cli.main import main\n"
        f"for arguments in {cases!r}:\n"
        "    try:\n        main(arguments)\n        sys.exit('no exit')\n    except SystemExit as end:\n"
        "        assert end.code == (0 if arguments and arguments != ['nonsense'] else 2), (arguments, end.code)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'onnxruntime', 'tqdm', 'psutil', 'pydantic', 'filelock'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli_runs.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"sglp-deploy {__version__}" in done.stdout
    for verb in VERBS:
        assert f"usage: sglp-deploy {verb}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "m", "--drop", "1", "--keep", "2"], "--keep: not allowed with argument --drop"),
        (["plan", "m"], "plan needs a budget: one of --drop, --keep, --max-parameters"),
        (["run", "m"], "run needs a budget"),
        (["plan", "m", "--drop", "six"], "'six' is neither a number of layers (6) nor a share of them (0.2)"),
        (["export", "m", "-o", "d"], "export takes a plan or --baseline, one of the two"),
        (["export", "m", "plan.json", "--baseline", "-o", "d"], "export takes a plan or --baseline, one of the two"),
        (["materialize", "m", "plan.json"], "required: -o/--output"),
        (["plan", "m", "--drop", "1", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_wrong_command_line_exits_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


# ----------------------------------------------------------------------------------------------------------- the verbs


def test_the_verbs_go_from_a_model_to_a_certified_artifact(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_file = tmp_path / "plan.json"
    plan = answer(capsys, "plan", model, "--drop", "2", *cli_runs.SMALL, "-o", plan_file)
    assert plan == json.loads(plan_file.read_text())
    assert len(plan["drop"]) == 2
    assert plan["similarity"] is not None

    made = answer(capsys, "materialize", model, plan_file, "-o", tmp_path / "smaller")
    assert made == {
        "path": str(tmp_path / "smaller"),
        "n_layers": 4,
        "plan_digest": PruningPlan.load(plan_file).digest(),
        "left_behind": {},
    }
    assert json.loads((tmp_path / "smaller" / "config.json").read_text())["num_hidden_layers"] == 4

    exported = answer(capsys, "export", model, plan_file, "--to", "vllm", "-o", tmp_path / "vllm")
    assert (exported["format"], exported["n_layers"]) == ("vllm", 4)
    whole = answer(capsys, "export", model, "--baseline", "--to", "torch", "-o", tmp_path / "baseline")
    assert (whole["format"], whole["n_layers"]) == ("torch", 6)

    # The model and its element type are taken from the artifact.
    parity = answer(capsys, "verify", tmp_path / "vllm", "-o", tmp_path / "parity.json")
    assert parity["passed"]
    assert parity == json.loads((tmp_path / "parity.json").read_text())

    few = ("--tokens", "200", "--chunk", "32")
    dense = answer(capsys, "evaluate", model, *few, "-o", tmp_path / "dense.json")
    pruned = answer(capsys, "evaluate", tmp_path / "smaller", *few)
    assert dense == json.loads((tmp_path / "dense.json").read_text())
    assert dense["text"] == pruned["text"] == "builtin:held-out"
    assert dense["perplexity"] != pruned["perplexity"]


def test_a_plan_can_leave_the_matrix_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = answer(capsys, "plan", model, "--keep", "5", *cli_runs.SMALL, "--no-matrix", "-o", tmp_path / "p.json")
    assert plan["similarity"] is None
    assert plan["budget"] == {"keep": 5}


def test_an_artifact_of_another_element_type_is_verified_in_its_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("export", model, "--baseline", "--to", "torch", "--dtype", "bf16", "-o", tmp_path / "half")
    assert answer(capsys, *options)["precision"] == "bf16"
    parity = answer(capsys, "verify", tmp_path / "half")
    assert (parity["passed"], parity["precision"]) == (True, "bf16")


def test_builtin_text_means_the_held_out_share_when_a_model_is_judged(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "evaluate", model, "--text", "builtin", "--tokens", "64", "--chunk", "32")
    assert found["text"] == "builtin:held-out"


def test_a_run_folder_can_be_reported_again_and_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "report", run, "-o", tmp_path / "again")
    assert found == {"path": str(tmp_path / "again" / "report.html")}
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    first = json.loads((run / "report" / "report.json").read_text())
    assert again["cards"] == first["cards"]
    assert again["parity"] == first["parity"]


def test_plugins_lists_exporters_and_planners(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line["name"]: line for line in answer(capsys, "plugins")}
    ours = {"executorch", "gguf", "onnx", "openvino", "optimum", "ort-genai"}
    ours |= {"tensorrt", "tensorrt-kit", "torch", "vllm"}
    assert {name for name, line in lines.items() if line["kind"] == "exporter"} == ours
    assert {name for name, line in lines.items() if line["kind"] == "planner"} == {"auto", "sglp"}
    # What comes with the package is usable; what needs an extra is usable or says what it needs.
    assert all(lines[name]["reason"] is None for name in ("onnx", "torch", "vllm", "auto", "sglp"))
    assert all(lines[name]["reason"] is None or "needs" in lines[name]["reason"] for name in ours)


def test_show_prints_any_file_and_any_folder_of_ours(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "show", run)["schema"] == "run/2"
    assert answer(capsys, "show", run / "plan.json")["schema"] == "plan/3"
    assert answer(capsys, "show", run / "artifacts" / "onnx")["schema"] == "artifact/1"


@pytest.fixture
def fake_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A third party's exporter without torch, installed where worker processes find it too."""
    site = tmp_path / "site"
    (site / "fakeformat-1.0.dist-info").mkdir(parents=True)
    (site / "fakeformat-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fakeformat\nVersion: 1.0\n"
    )
    (site / "fakeformat-1.0.dist-info" / "entry_points.txt").write_text(
        "[sglp_deploy.exporters]\nfake = fakeformat:Exporter\n"
    )
    (site / "fakeformat.py").write_text(
        "import bench_fakes\nclass Exporter(bench_fakes.FakeExporter):\n"
        "    def export(self, model, out_dir, **options):\n        raise NotImplementedError\n"
    )
    monkeypatch.syspath_prepend(str(site))
    return site


def test_bench_measures_one_artifact_alone_and_two_as_a_pair(
    fake_format: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_artifact(tmp_path / "one")
    fake_artifact(tmp_path / "two", weight_bytes=800)
    alone = answer(capsys, "bench", tmp_path / "one", "--workload", "smoke", "-o", tmp_path / "alone")
    assert alone["schema"] == "result/2"
    assert list(alone["arms"]) == ["artifact"]
    options = ("--workload", "smoke", "--no-control", "--threads", "1", "-o", tmp_path / "pair")
    pair = answer(capsys, "bench", tmp_path / "two", "--against", tmp_path / "one", *options)
    assert pair["schema"] == "comparison/2"
    assert pair["metrics"]["weight_bytes"]["ratio"] == 1.25
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["comparison.json", "result.json"]


def test_incomparable_artifacts_exit_4_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_artifact(tmp_path / "one")
    fake_artifact(tmp_path / "two", precision="bf16")
    options = ("bench", tmp_path / "two", "--against", tmp_path / "one", "--workload", "smoke", "-o", tmp_path / "out")
    assert "the two results differ in precision" in refusal(capsys, *options, code=4)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_fails_is_one_line_with_its_own_last_words(
    fake_format: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_artifact(tmp_path / "one", behaviour="crash")
    message = refusal(capsys, "bench", tmp_path / "one", "--workload", "smoke", "-o", tmp_path / "out")
    assert "the worker of arm 'artifact' failed with exit status 1" in message
    assert "(last line: RuntimeError: the fake runtime fell over)" in message


# -------------------------------------------------------------------------------------------------- what is on a stream


def test_a_traced_export_leaves_stdout_to_the_answer_and_stderr_empty_when_quiet(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the file descriptors, because libraries also write past Python's streams."""
    monkeypatch.setattr(OnnxExporter, "_template", None)  # or an earlier test's trace would be used
    onnx = tmp_path / "onnx"
    assert main(["export", str(model), "--baseline", "--to", "onnx", "-o", str(onnx), "--json", "-q"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    *text, last = out.splitlines()
    assert json.loads(last) == json.loads((onnx / "manifest.json").read_text())
    assert main(["show", str(onnx)]) == 0
    assert text == [*capfd.readouterr().out.splitlines(), "", f"written to {onnx}"]


def test_progress_goes_to_stderr_only(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--drop", "1", *cli_runs.SMALL, "-o", str(tmp_path / "plan.json")]) == 0
    out, err = capsys.readouterr()
    assert "loading" in err
    assert "calibrate: 100%" in err
    assert "calibrate" not in out
    assert out.startswith("sglp: keep 5 of 6 layers")
    assert out.endswith(f"written to {tmp_path / 'plan.json'}\n")


def test_a_warning_is_shown_even_when_quiet_and_a_note_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.note("a note")
    console.progress("stage", 1, 2)
    console.warn("a warning")
    assert capsys.readouterr() == ("", "warning: a warning\n")


def test_an_error_starts_on_a_line_of_its_own_below_a_half_drawn_bar(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_done(arguments: Any, console: Console) -> int:
        console.progress("stage", 1, 2)
        raise RuntimeError("in the middle\nwith a second line")

    monkeypatch.setattr("sglp_deploy.cli.verbs.run_show", half_done)
    assert main(["show", str(run)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "error: RuntimeError: in the middle (last line: with a second line); this is a fault of sglp-deploy; "
        "run again with -v and report it"
    )


def test_output_into_a_closed_pipe_ends_quietly(run: Path) -> None:
    command = f"{sys.executable} -m sglp_deploy show {run / 'plan.json'} --json | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=cli_runs.environment(), capture_output=True, text=True, check=False
    )
    first, _ = done.stdout.splitlines()
    assert first.startswith("sglp: keep 4 of 6 layers")
    assert done.stderr == ""


def test_a_reader_that_has_gone_gives_exit_code_1(run: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads: deterministic, where head may or may not be quick enough
    with os.fdopen(writer, "w") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "sglp_deploy", "show", str(run / "plan.json")],
            env=cli_runs.environment(),
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")


# ------------------------------------------------------------------------------------------------ errors, one line each


@pytest.mark.parametrize("where", ["/nowhere/model", "./nowhere", "nowhere.gguf"])
def test_a_missing_model_is_refused(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", where, "--drop", "1", "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {Path(where)} ")
    assert "check the path" in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_calibration_file_is_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "no.txt"
    message = refusal(capsys, "plan", "/nowhere/model", "--drop", "1", "--calibration", text)
    assert message == f"error: calibration text {text} cannot be read; No such file or directory; check the path\n"


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_empty_calibration_text_is_refused(
    content: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "empty.txt"
    text.write_text(content)
    message = refusal(capsys, "plan", model, "--drop", "1", "--calibration", text, "-o", tmp_path / "plan.json")
    assert f"{text} holds no text" in message
    assert not (tmp_path / "plan.json").exists()


def test_nan_weights_are_refused_by_plan_and_by_evaluate(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    plan = tmp_path / "plan.json"
    message = refusal(capsys, "plan", broken, "--drop", "1", *cli_runs.SMALL, "-o", plan)
    assert "NaN" in message or "finite" in message
    assert not plan.exists()
    message = refusal(capsys, "evaluate", broken, "--tokens", "64", "--chunk", "32")
    assert "the loss on the evaluation text is not finite" in message


@pytest.mark.parametrize("drop", ["6", "7"])
def test_dropping_every_layer_is_refused(
    drop: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "plan", model, "--drop", drop, *cli_runs.SMALL, "-o", tmp_path / "plan.json")
    assert f"drop={drop}" in message
    assert "6 layers" in message
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--drop", "1", "--option", "criterion=grad-nrom"],
            "unknown criterion 'grad-nrom'; .*did you mean 'grad-norm'?",
        ),
        (["--drop", "1", "--method", "sglq"], "unknown method 'sglq'; .*did you mean 'sglp'?"),
        (["--drop", "1", "--option", "estimator=unbias"], "unknown estimator 'unbias'; .*did you mean 'unbiased'?"),
        (["--drop", "1.5"], "drop=1.5 is a float"),
        (["--drop", "-1"], "drop=-1 is out of range"),
        (["--keep", "0"], "keep=0 is out of range"),
        (["--drop", "1", "--option", "n_segments=0"], "n_segments=0 is too small"),
        (["--drop", "1", "--threads", "0"], "threads=0 is too small"),
        (["--drop", "1", "--threads", "100000"], "threads=100000 is too large; nothing could work with it; pass 4096"),
        (["--drop", "1", "--seed", str(2**63)], f"seed={2**63} is too large"),
    ],
)
def test_a_wrong_value_is_refused_before_the_model_is_read(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(words, refusal(capsys, "plan", "/nowhere/model", *arguments))


def test_an_unknown_exporter_is_refused_with_the_nearest_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["export", "/nowhere/model", run / "plan.json", "--to", "onxn", "-o", tmp_path / "out"],
        ["run", "/nowhere/model", "--drop", "1", "--to", "onxn", "-o", tmp_path / "out"],
    ):
        assert "there is no exporter 'onxn'; did you mean 'onnx'?" in refusal(capsys, *arguments)
        assert not (tmp_path / "out").exists()


def test_an_unknown_workload_is_refused_with_the_nearest_name(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["bench", artifact, "--workload", "smoek", "-o", tmp_path / "out"],
        ["run", "/nowhere/model", "--drop", "1", "--workload", "smoek", "-o", tmp_path / "out"],
    ):
        message = refusal(capsys, *arguments)
        assert "no workload is named 'smoek'" in message
        assert "did you mean 'smoke'?" in message
        assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.save_tiny(tmp_path / "other", seed=1)
    capsys.readouterr()  # transformers drew a bar while it saved
    out = tmp_path / "out"
    for arguments in (["materialize", other, run / "plan.json"], ["export", other, run / "plan.json", "--to", "vllm"]):
        message = refusal(capsys, *arguments, "-o", out)
        assert "the plan is for" in message
        assert "make a plan for this model" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    message = refusal(capsys, "verify", run / "artifacts" / "vllm", "--model", other)
    assert "the plan is for" in message


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_flip, "differs from its digest in the manifest"),
        (_truncate, "the file is damaged"),
        (Path.unlink, "is missing; the manifest lists it"),
    ],
)
def test_a_damaged_artifact_is_refused_by_verify_and_bench(
    damage: Any, words: str, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(artifact / "model.safetensors")
    assert words in refusal(capsys, "verify", artifact)
    assert words in refusal(capsys, "bench", artifact, "--workload", "smoke", "-o", tmp_path / "out")


def test_an_unknown_schema_is_refused_by_name(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = artifact / "manifest.json"
    manifest.write_text(manifest.read_text().replace("artifact/1", "artifact/9"))
    message = f"{manifest} has schema 'artifact/9'; this version reads 'artifact/1'"
    assert message in refusal(capsys, "verify", artifact)
    assert "schema 'artifact/9' is unknown to this version" in refusal(capsys, "show", artifact)


def test_an_output_folder_that_is_a_file_is_refused_and_kept(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("mine")
    for arguments in (
        ["materialize", model, run / "plan.json", "-o", file],
        ["export", model, run / "plan.json", "--to", "vllm", "-o", file],
        ["run", model, "--drop", "1", "--to", "vllm", "-o", file],
    ):
        assert f"{file} is a file" in refusal(capsys, *arguments)
    for below in (
        ["export", model, run / "plan.json", "--to", "vllm", "-o", file / "x"],
        ["run", model, "--drop", "1", "--to", "vllm", "-o", file / "x"],
        ["bench", run / "artifacts" / "vllm", "--workload", "smoke", "-o", file],
    ):
        assert "file" in refusal(capsys, *below)
    assert file.read_text() == "mine"


def test_a_tilde_is_the_home_folder_in_every_path(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    answer(capsys, "plan", model, "--drop-layers", "1", "--output=~/plans/p.json")
    (tmp_path / "model").symlink_to(model)
    answer(capsys, "materialize", "~/model", "~/plans/p.json", "-o", "~/smaller")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plans", "smaller"]
    (tmp_path / "sglp.toml").write_text('[model]\npath = "~/model"\n[run]\noutput = "~/out"\n')
    config = RunConfig.load(tmp_path / "sglp.toml", drop=1, to=("onnx",))
    assert (config.model, config.output) == (str(tmp_path / "model"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("~", "/home/me"),
        ("~/a.jsonl,last-word:~/b", "/home/me/a.jsonl,last-word:/home/me/b"),
        ("--option=plan.cache=~/c", "--option=plan.cache=/home/me/c"),
        ("a~/b", "a~/b"),
        ("roughly ~3", "roughly ~3"),
    ],
)
def test_a_tilde_is_the_home_folder_where_a_path_begins(
    words: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home(words) == meant


def test_a_tilde_is_the_home_folder_in_lists_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "sglp.toml").write_text(
        '[model]\npath = "m"\n[heal]\ntokens = 9\ntext = ["~/a.txt", "written"]\n'
        '[evaluate]\ntasks = ["last-word:~/b.txt"]\n'
    )
    config = RunConfig.load(tmp_path / "sglp.toml", drop=1, to=("onnx",))
    assert (config.heal_text, config.tasks) == (("/home/me/a.txt", "written"), ("last-word:/home/me/b.txt",))


def test_no_name_reaches_the_terminal_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = "mod\x1b]0;title\x07\u202eeman\tcolumn"
    shown = r"mod\x1b]0;title\x07\u202eeman" + "\tcolumn"
    console = Console()
    console.note(words)
    console.warn(words)
    console.result(words, {})
    out, err = capsys.readouterr()
    assert (out, err) == (f"{shown}\n", f"{shown}\nwarning: {shown}\n")
    assert main(["show", words]) == 1
    assert r"\x1b]0;title" in capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_show_does_not_end_a_command(model: Path, tmp_path: Path) -> None:
    named = tmp_path / "mod\u00e8le"
    named.symlink_to(model)
    done = cli_runs.command(
        ["plan", str(named), "--drop-layers", "1", "-o", str(tmp_path / "p.json")], PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0, done.stderr
    assert "mod\\xe8le" in done.stderr


def test_a_folder_with_somebodys_files_is_never_replaced(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    materialize = ["materialize", model, run / "plan.json", "-o"]
    assert "holds other files" in refusal(capsys, *materialize, tmp_path / "home")
    # Extensions of browsers and other tools have a file of this name too.
    (tmp_path / "home" / "manifest.json").write_text('{"manifest_version": 3, "name": "mine"}')
    assert "holds other files" in refusal(capsys, *materialize, tmp_path / "home")
    assert "no run.json" in refusal(capsys, "run", model, "--drop", "1", "--to", "vllm", "-o", tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    assert "holds the current folder" in refusal(capsys, *materialize, ".")
    assert "holds the current folder" in refusal(capsys, *materialize, "..")
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["manifest.json", "thesis.txt"]


def test_a_checkpoint_is_replaced_as_it_was_written_and_not_once_somebody_has_put_files_into_it(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        answer(capsys, "materialize", model, run / "plan.json", "-o", out)
    (out / "NOTES.md").write_text("mine")
    assert "out holds other files: NOTES.md, of which" in refusal(
        capsys, "materialize", model, run / "plan.json", "-o", out
    )
    assert (out / "NOTES.md").read_text() == "mine"


def test_an_artifact_is_replaced_by_a_new_one(
    model: Path, run: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, "export", model, "--baseline", "--to", "vllm", "-o", artifact)
    assert ExportArtifact.load(artifact).n_layers == 6


def test_an_output_file_that_is_a_folder_is_refused_before_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["plan", "/nowhere/model", "--drop", "1"], ["verify", run / "artifacts" / "vllm"]):
        assert f"{tmp_path} is a folder" in refusal(capsys, *arguments, "-o", tmp_path)


def test_a_pickle_checkpoint_is_refused_unless_allowed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = Path(shutil.copytree(model, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    few = ("--tokens", "64", "--chunk", "32")
    assert "stores its weights as pickle" in refusal(capsys, "evaluate", pickled, *few)
    assert answer(capsys, "evaluate", pickled, *few, "--allow-pickle")["n_tokens"] > 0


def test_a_certificate_that_fails_exits_3(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are changed together with the manifest, so only computing can find it."""
    tensors = load_file(artifact / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "sha256": _io.sha256_file(artifact / "model.safetensors"),
        "bytes": (artifact / "model.safetensors").stat().st_size,
    }
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    found = answer(capsys, "verify", artifact, "-o", tmp_path / "parity.json", code=3)
    assert not found["passed"]
    assert found["reasons"]
    assert json.loads((tmp_path / "parity.json").read_text())["passed"] is False


def test_a_model_that_has_moved_is_asked_for(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = artifact / "manifest.json"
    value = json.loads(manifest.read_text())
    for place, words in (("/gone/model", "/gone/model is not there"), ("", "does not say which model it came from")):
        value["model"]["id"] = place
        manifest.write_text(json.dumps(value))
        message = refusal(capsys, "verify", artifact)
        assert words in message
        assert "pass --model" in message


def test_a_folder_that_is_no_run_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it is no run folder" in refusal(capsys, "report", tmp_path)
    assert "is not a folder" in refusal(capsys, "report", tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (
            OSError(28, "No space left on device", "/x/y"),
            "/x/y cannot be used; No space left on device; free some space",
        ),
        (
            PermissionError(13, "Permission denied", "/x"),
            "/x cannot be used; Permission denied; check the path and its",
        ),
        (MemoryError(), "out of memory; MemoryError; close other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; DefaultCPUAllocator"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero; this is a fault of sglp-deploy"),
    ],
)
def test_a_failure_below_us_is_one_line_and_a_traceback_only_on_request(
    raised: Exception, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: Any, console: Console) -> int:
        raise raised

    monkeypatch.setattr("sglp_deploy.cli.verbs.run_plugins", fail)
    assert words in refusal(capsys, "plugins")
    assert main(["plugins", "-v"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize(("verb", "kept"), [("run", "finished stages are kept"), ("show", "nothing half-made is left")])
def test_ctrl_c_says_what_is_kept_and_exits_130(
    verb: str, kept: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: Any, console: Console) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sglp_deploy.cli.verbs.run_{verb}", interrupted)
    assert main([verb, "x", *(["--drop", "1"] if verb == "run" else [])]) == 130
    assert capsys.readouterr() == ("", f"interrupted; {kept}; run the same command again to go on\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_manager_s_signal_unwinds_like_ctrl_c_and_handlers_are_put_back(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(arguments: Any, console: Console) -> int:
        signal.raise_signal(number)
        raise AssertionError("the signal was not delivered")

    monkeypatch.setattr("sglp_deploy.cli.verbs.run_show", stopped)
    before = signal.getsignal(number)
    assert main(["show", "x"]) == 130
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("say", ["note", "progress"])
def test_a_signal_that_a_library_swallows_is_heard_at_the_next_word(
    number: signal.Signals, say: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def stopped(arguments: Any, console: Console) -> int:
        with suppress(KeyboardInterrupt):  # as a callback of a library does
            signal.raise_signal(number)
        said.append("went on")
        console.note("next stage") if say == "note" else console.progress("stage", 1, 2)
        raise AssertionError("nobody heard it")

    monkeypatch.setattr("sglp_deploy.cli.verbs.run_show", stopped)
    assert main(["show", "x", "-q"]) == 130
    assert said == ["went on"]


# ------------------------------------------------------------------------------------------------------- no connection


@pytest.fixture
def online_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HF_HUB_OFFLINE")  # the tests' own setting; monkeypatch puts it back
    yield
    os.environ.pop("HF_HUB_OFFLINE", None)


def test_without_a_connection_the_hub_is_asked_once(
    online_mode: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    session.settle_connection(Console(), "some-org/some-model")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_a_model_on_disk_needs_no_connection(online_mode: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    session.settle_connection(Console(), str(model), None, "builtin")
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_hub_identifier_without_a_connection_is_one_line_at_once() -> None:
    done = cli_runs.command(
        ["evaluate", "some-org/some-model", "-q"], HF_HUB_OFFLINE="", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: model 'some-org/some-model' cannot be loaded; ")
    assert done.stderr.count(";") >= 2


def test_options_of_a_format_are_given_by_key_and_value(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", model, run / "plan.json", "--to", "vllm", "-o", tmp_path / "out"]
    message = refusal(capsys, *export, "--option", "quantize=int4", "--option", "bits=4")
    assert "exporter 'vllm' does not know bits, quantize" in message
    with pytest.raises(SystemExit) as stopped:
        main([str(item) for item in export] + ["--option", "int4"])
    assert stopped.value.code == 2
    assert "'int4' is no option; write KEY=VALUE" in capsys.readouterr().err
