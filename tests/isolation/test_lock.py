"""Locks: one holder at a time, gone with a killed holder, and no symbolic link is followed."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import cli_runs
from sglp_deploy.cli import ledger
from sglp_deploy.errors import ConfigError, StorageError
from sglp_deploy.isolation import environments, lock

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom sglp_deploy.isolation import lock\n"
    "with lock.held(Path(sys.argv[1]), busy=lambda: None):\n    print('held', flush=True)\n    time.sleep(300)\n"
)


class Busy(Exception):
    pass


def give_up() -> None:
    raise Busy


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that holds ``path`` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env=cli_runs.environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_and_a_killed_holder_leaves_no_lasting_lock(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    process = holder(path)
    try:
        with pytest.raises(Busy), lock.held(path, busy=give_up):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]  # it is a pipe
    with lock.held(path, busy=give_up):
        pass
    assert path.is_file()


def test_who_does_not_give_up_waits_for_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    process = holder(path)
    said: list[str] = []

    def busy() -> None:
        said.append("waiting")
        process.kill()

    with lock.held(path, busy=busy):
        assert said == ["waiting"]
        assert process.wait() == -signal.SIGKILL
    process.stdout.close()  # type: ignore[union-attr]  # it is a pipe


def test_the_lock_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    with pytest.raises(ZeroDivisionError), lock.held(path, busy=give_up):
        _ = 1 / 0
    with lock.held(path, busy=give_up), pytest.raises(Busy), lock.held(path, busy=give_up):
        pass


def test_a_lock_that_is_a_symbolic_link_is_refused_and_its_target_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened for writing, the link would have emptied what it points to."""
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    monkeypatch.setenv("SGLP_DEPLOY_HOME", str(tmp_path / "home"))
    home = environments.home()
    run = tmp_path / "run"
    for folder, name in ((run, ".lock"), (home, "gguf.lock")):
        folder.mkdir(parents=True)
        (folder / name).symlink_to(precious)
    with pytest.raises(ConfigError) as of_run, ledger.run_folder(run):
        pass
    with pytest.raises(ConfigError) as of_environment:
        environments.create("gguf")
    assert [str(of_run.value), str(of_environment.value)] == [
        f"{link} is a symbolic link; a lock is a file of our own and no link is followed; remove the link"
        for link in (run / ".lock", home / "gguf.lock")
    ]
    assert precious.read_text() == "mine"


def test_a_link_that_is_put_there_in_the_last_moment_is_not_followed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / "it.lock").symlink_to(precious)
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with pytest.raises(OSError, match="symbolic links"), lock.held(tmp_path / "it.lock", busy=give_up):
        pass
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")])
def test_a_file_system_without_locks_is_said_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_arguments: object, **_more: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with (
        pytest.raises(StorageError, match=r"\.lock cannot be locked; its file system has no locks .*another disk"),
        lock.held(tmp_path / ".lock", busy=give_up),
    ):
        pytest.fail("it is held")
