import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import bench_fakes
from bench_fakes import OPENER, VOCABULARY, fake_artifact
from sglp_bench.devices.here import run_worker
from sglp_bench.measure import worker
from sglp_bench.measure.worker import main, resolve_opener, run_block
from sglp_bench.result import Block, check_samples
from sglp_bench.workloads.generate import Workload
from sglp_bench.workloads.generate_samples import BlockSamples
from sglp_deploy.errors import BenchmarkError, ConfigError

TINY = Workload("tiny", prompt_tokens=3, decode_tokens=2, warmup_max=2, prefill_repeats=2, decode_repeats=1, cycles=1)


def spec(tmp_path: Path, mode: str = "time", opener: str | None = OPENER, **details: Any) -> dict[str, Any]:
    artifact = fake_artifact(tmp_path / "artifact", **details)
    return {
        "schema": "block-spec/1",
        "mode": mode,
        "artifact": str(artifact.path),
        "artifact_digest": artifact.digest,
        "opener": opener,
        "workload": TINY.to_json(),
        "vocab_size": VOCABULARY,
        "pythonpath_before": os.environ.get("PYTHONPATH"),
    }


def start(what: dict[str, Any], *, threads: int | None = None, timeout_s: float = 60) -> dict[str, Any]:
    return run_worker(what, label="arm", threads=threads, timeout_s=timeout_s)


def test_a_time_block_in_its_own_process_gives_valid_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/before")
    answer = start(spec(tmp_path, log=str(tmp_path / "log")), threads=3)
    samples = BlockSamples.from_json(answer["samples"])
    check_samples("arm", Block(0, 0, 0, answer["load_s"], samples), TINY)
    seen = json.loads((tmp_path / "log").read_text())
    # Threads were set before the process began, the parent's search path does not leak into what a runner starts,
    # and the harness itself loaded no runtime.
    assert seen.pop("pid") != os.getpid()
    assert seen == {"omp": "3", "pythonpath": "/before", "torch": False}


def test_a_memory_block_answers_with_named_probes_and_no_times(tmp_path: Path) -> None:
    answer = start(spec(tmp_path, "memory"))
    assert "samples" not in answer
    assert set(answer["memory"]) == {"host_idle", "host_peak"}
    assert answer["memory"]["host_peak"]["bytes"] >= answer["memory"]["host_idle"]["bytes"] > 0


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("crash", r"(?s)arm 'arm' failed with exit status 1; .*run the same command again.*fake runtime fell over"),
        ("killed", r"was ended by SIGKILL; the machine may be out of memory"),
        ("vanish", r"ended without a readable answer; .*does not exist.*os\._exit"),
        ("rubbish", r"ended without a readable answer; .*cannot be read as a block file"),
        ("nan", r"(?s)failed with exit status 1.*error: prefill gave logits that are not finite"),
        ("forward only", r"(?s)error: the runner of format 'fake' has no prefill and decode; .*whose runner generates"),
    ],
)
def test_a_worker_that_fails_becomes_one_error_with_its_last_lines(
    tmp_path: Path, behaviour: str, message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        start(spec(tmp_path, behaviour=behaviour))


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"gave no answer in 2 s; it hangs, .*; pass a larger timeout_s"):
        start(spec(tmp_path, behaviour="hang"), timeout_s=2)


def test_an_interrupt_of_the_benchmark_ends_its_worker(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    log = tmp_path / "log"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            start(spec(tmp_path, behaviour="hang", log=str(log)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if log.exists():  # on a very busy machine the worker may not have got that far
        assert not psutil.pid_exists(json.loads(log.read_text())["pid"])


def test_an_expected_failure_prints_one_line_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError) as caught:
        start({**spec(tmp_path), "artifact_digest": "another"})
    assert "changed during the benchmark" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_the_command_line_wants_two_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["one"]) == 2
    assert "usage: python -m sglp_bench.measure.worker SPEC.json OUT.json" in capsys.readouterr().err


def test_main_writes_the_answer_or_prints_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # main changes it; this puts it back
    what, out = tmp_path / "spec.json", tmp_path / "out.json"
    what.write_text(json.dumps(spec(tmp_path)))
    assert main([str(what), str(out)]) == 0
    assert json.loads(out.read_text())["schema"] == "block/1"
    assert main([str(tmp_path / "none.json"), str(out)]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("opener", "message"),
    [
        ("bench_fakes", "is not 'module:attr'"),
        ("no_such_module:X", "cannot be loaded; No module named 'no_such_module'"),
        ("bench_fakes:Missing", "cannot be loaded; .*has no attribute 'Missing'"),
    ],
)
def test_an_opener_that_cannot_be_loaded_is_refused(opener: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_opener(opener)


def test_without_an_opener_the_registry_is_asked_for_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def registered(name: str) -> Any:
        asked.append(name)
        return resolve_opener(OPENER)

    monkeypatch.setattr(worker, "_registered", registered)
    run_block(spec(tmp_path, opener=None))
    assert asked == ["fake"]


def test_a_runner_whose_times_mean_nothing_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "its steps are no steps; time something else"
    monkeypatch.setattr(bench_fakes.FakeRunner, "not_timed", why, raising=False)
    log = tmp_path / "log"
    with pytest.raises(BenchmarkError, match=r"the runner of format 'fake' is not timed; its steps are no steps; time"):
        run_block(spec(tmp_path, log=str(log)))
    assert not log.exists()


def test_importing_the_worker_loads_no_runtime() -> None:
    runtimes = "{'torch', 'transformers', 'onnx', 'scipy'}"
    code = f"import sys, sglp_bench.measure.worker; print(sorted({runtimes} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
