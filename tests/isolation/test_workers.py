"""A worker in another process, and every way it can go wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from sglp_deploy.errors import BackendError
from sglp_deploy.isolation.workers import Worker

_SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])
import numpy as np
from worker_loop import serve

def double(values, offset=0):
    print("libraries print here", flush=True)
    return {"values": values * 2 + offset, "kind": str(values.dtype), "nested": {"a": [1, 2]}}

def fail():
    raise RuntimeError("the engine is out of oil\\nsecond line")

def die():
    print("last words before the end", flush=True)
    os._exit(7)

def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def hang():
    time.sleep(600)

def rubbish():
    os.write(int(sys.argv[1]), b"not json\\n")
    return {}

def escape():
    return {"values": {"npy": "/etc/hostname"}}

def seen():
    return {"torch": "torch" in sys.modules, "path": os.environ.get("PYTHONPATH"), "extra": os.environ.get("EXTRA")}

def imported(name):
    return {"file": __import__(name).__file__}

serve(globals() | {"pid": lambda: {"pid": os.getpid()}})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(_SCRIPT)
    return path


def _worker(script: Path, timeout_s: float = 60.0) -> Worker:
    return Worker(Path(sys.executable), script, name="toy", timeout_s=timeout_s, environment={"EXTRA": "1"})


def test_values_and_arrays_travel_both_ways_bit_for_bit(script: Path) -> None:
    given = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    with _worker(script) as worker:
        for _ in range(3):
            answer = worker.ask("double", values=given, offset=1)
            np.testing.assert_array_equal(answer["values"], given * 2 + 1)
            assert answer["values"].dtype == np.float32
            assert (answer["kind"], answer["nested"]) == ("float32", {"a": [1, 2]})


def test_a_worker_inherits_none_of_our_packages(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    with _worker(script) as worker:
        assert worker.ask("seen") == {"torch": False, "path": None, "extra": "1"}


def test_what_lies_beside_a_worker_s_script_shadows_no_module(script: Path) -> None:
    script.with_name("colorsys.py").write_text("raise ImportError('this is not the standard library')\n")
    with _worker(script) as worker:
        assert Path(worker.ask("imported", name="colorsys")["file"]).parent != script.parent
        assert Path(worker.ask("imported", name="worker_loop")["file"]).parent.name == "worker_side"


def test_an_exception_comes_back_in_words_and_the_worker_goes_on(script: Path) -> None:
    with _worker(script) as worker:
        with pytest.raises(BackendError, match="worker failed on 'fail'; RuntimeError: the engine is out of oil"):
            worker.ask("fail")
        with pytest.raises(BackendError, match="KeyError: 'unheard'"):
            worker.ask("unheard")
        assert worker.ask("double", values=np.ones(1))["values"] == 2


def test_a_worker_that_dies_leaves_its_last_words(script: Path) -> None:
    with (
        _worker(script) as worker,
        pytest.raises(BackendError, match=r"ended with exit status 7 on 'die'(?s:.*)last words before the end"),
    ):
        worker.ask("die")


def test_a_killed_worker_is_named_by_its_signal(script: Path) -> None:
    with _worker(script) as worker:
        with pytest.raises(BackendError, match=r"was ended by SIGKILL on 'be_killed'; the machine may be out"):
            worker.ask("be_killed")
        with pytest.raises(BackendError, match="is not running"):
            worker.ask("double", values=np.ones(1))


def test_a_worker_that_hangs_is_stopped(script: Path) -> None:
    with _worker(script) as worker:
        pid = worker.ask("pid")["pid"]
        with pytest.raises(BackendError, match=r"gave no answer to 'hang' in 0\.5 s and was stopped"):
            worker.ask("hang", timeout_s=0.5)
        assert not Path(f"/proc/{pid}").exists()


def test_rubbish_is_called_rubbish(script: Path) -> None:
    with _worker(script) as worker, pytest.raises(BackendError, match="answered 'rubbish' with rubbish"):
        worker.ask("rubbish")


def test_a_worker_cannot_make_us_read_elsewhere(script: Path) -> None:
    with _worker(script) as worker, pytest.raises(BackendError, match="lies outside the exchange folder"):
        worker.ask("escape")


def test_an_interpreter_that_is_not_there_is_one_error(script: Path) -> None:
    with pytest.raises(BackendError, match="the toy worker cannot be started"):
        Worker(Path("/nowhere/python"), script, name="toy").__enter__()


def test_a_script_that_does_not_parse_shows_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("def (:\n")
    with (
        Worker(Path(sys.executable), script, name="toy") as worker,
        pytest.raises(BackendError, match=r"ended with exit status 1(?s:.*)SyntaxError"),
    ):
        worker.ask("anything")


def test_leaving_ends_the_process(script: Path) -> None:
    with _worker(script) as worker:
        pid = worker.ask("pid")["pid"]
    assert not Path(f"/proc/{pid}").exists()
