"""No process of ours outlives the one that started it, and no folder of a killed one stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

import cli_runs
from sglp_deploy import _io
from sglp_deploy.isolation import children
from sglp_deploy.isolation.children import WATCHED, end_group, watched

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")

# Starts a watched command that starts a child of its own, and says who they are.
_PARENT = (
    "import os, subprocess, sys, time\n"
    "from sglp_deploy import _io\n"
    "from sglp_deploy.isolation.children import WATCHED, watched\n"
    "inner = 'import subprocess, sys, time, os; '\\\n"
    '  \'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]); \'\\\n'
    "  'print(os.getpid(), child.pid, flush=True); time.sleep(600)'\n"
    "with _io.scratch('test') as folder:\n"
    "    process = subprocess.Popen(watched([sys.executable, '-c', inner]), stdin=subprocess.PIPE,\n"
    "                               env=os.environ | WATCHED, start_new_session=True)\n"
    "    print(folder, flush=True)\n"
    "    time.sleep(600)\n"
)


def _gone(pids: list[int], within_s: float = 30) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_children_and_grandchildren_along_and_its_folder_is_swept_next(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = cli_runs.environment(TMPDIR=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        lines = sorted((parent.stdout.readline().split() for _ in range(2)), key=len)
        folder, pids = Path(lines[0][0]), [int(pid) for pid in lines[1]]
        with _io.scratch("test") as other:  # a living owner's folder is left alone
            assert folder.is_dir()
            assert other.parent == folder.parent == tmp_path
        assert not _gone(pids, within_s=0.3)
        parent.send_signal(number)
        parent.wait()
    assert _gone(pids)
    assert folder.is_dir()
    with _io.scratch("test"):
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "sglp-test-mine").mkdir()
    (tmp_path / "sglp-test-link").symlink_to(tmp_path)
    with _io.scratch("test"):
        assert len(list(tmp_path.iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sglp-test-link", "sglp-test-mine"]


def test_a_leader_that_is_killed_leaves_none_of_its_group(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    ) as leader:
        assert leader.stdout is not None
        child = int(leader.stdout.readline())
        leader.kill()
        leader.wait()
        assert psutil.pid_exists(child)
        end_group(leader)
    assert _gone([child])


def test_a_watched_command_ends_as_it_would_alone() -> None:
    process = subprocess.Popen(
        watched([sys.executable, "-c", "import sys; sys.exit(7)"]),
        stdin=subprocess.PIPE,
        env=os.environ | WATCHED,
        start_new_session=True,
    )
    assert process.wait(60) == 7
    end_group(process)  # it has ended; nobody else is hit
    assert process.stdin is not None
    process.stdin.close()


def test_what_a_command_prints_and_how_it_ended_come_back() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = children.run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with_own = children.run(
        [sys.executable, "-c", "import os; print(os.environ['ONE'])"], environment={**os.environ, "ONE": "1"}
    )
    assert with_own.stdout == "1\n"
    killed = children.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.returncode == -signal.SIGKILL


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; from pathlib import Path; "
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, "-c", code], timeout_s=8)
    assert _gone([int((tmp_path / "pid").read_text())])
