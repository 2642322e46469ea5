from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, ConfigError, StorageError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_canonical_json_has_one_spelling() -> None:
    assert _io.canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'
    assert _io.sha256_json({"b": 1, "a": 2}) == _io.sha256_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match=r"Out of range float values"):
        _io.canonical_json(float("nan"))


def test_the_digest_of_a_file_is_sha256_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one piece
    (tmp_path / "a").write_bytes(data)
    assert _io.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_file_is_written_whole_readable_and_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "a.json"
    _io.write_json(file, {"name": "ü"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"name": "ü"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert _names(file.parent) == ["a.json"]


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    _io.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match=r"Out of range"):
        _io.write_json(tmp_path / "a.json", float("inf"))
    assert (tmp_path / "a.json").read_text() == "1\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the device; free some space and run the same command again"),
        (errno.EDQUOT, "no space left on the device; free some space and run the same command again"),
        (errno.EACCES, "Permission denied; check the folder's permissions and run the same command again"),
        (errno.EROFS, "Read-only file system; check the folder's permissions and run the same command again"),
    ],
)
def test_a_refused_write_is_explained_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    file = tmp_path / "a.txt"
    _io.write_text(file, "old")

    def refuse(_handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError) as caught:
        _io.write_text(file, "new")
    assert str(caught.value) == f"cannot write {file}; {message}"
    assert isinstance(caught.value.__cause__, OSError)
    assert file.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_a_full_disk_reported_in_a_librarys_own_words_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no space left on the device"), _io.storage_errors(tmp_path):
        raise RuntimeError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')


@pytest.mark.parametrize("error", [RuntimeError("a bug of ours"), FileNotFoundError(errno.ENOENT, "gone")])
def test_other_errors_pass_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, _io.storage_errors(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json does not exist; one of our plan files was expected there; check the path"),
        ("{", r"a\.json cannot be read as a plan file; .*; make it again"),
        ("[]", r"a\.json has schema None; this version reads 'plan/1'; make the file again"),
        ('{"schema": "plan/2"}', r"has schema 'plan/2'; this version reads 'plan/1'"),
        ('{"schema": "artifact/1"}', r"has schema 'artifact/1'; this version reads 'plan/1'"),
    ],
)
def test_a_file_of_ours_that_is_not_one_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        _io.read_json(tmp_path / "a.json", "plan")


def test_a_file_of_ours_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": "plan/1", "x": 1}')
    assert _io.read_json(tmp_path / "a.json", "plan") == {"schema": "plan/1", "x": 1}
    assert _io.read_json(tmp_path / "a.json", "plan", (1, 2)) == {"schema": "plan/1", "x": 1}
    with pytest.raises(ArtifactError, match=r"has schema 'plan/1'; this version reads 'plan/2' and 'plan/3'; make the"):
        _io.read_json(tmp_path / "a.json", "plan", (2, 3))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x"])
def test_a_name_may_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match=rf"'{name}' points outside .*; a file name may not leave its folder"):
        _io.inside(root, name)
    assert _io.inside(root, "a/b") == (root / "a" / "b").resolve()


def test_a_staged_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with _io.staged_directory(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    assert _names(final) == ["a"]
    assert stat.S_IMODE(final.stat().st_mode) == 0o755
    assert _names(final.parent) == ["out"]


def _written_by_us(folder: Path) -> Path:
    folder.mkdir()
    (folder / "old").write_text("1")
    _io.write_file_list(folder)
    return folder


def test_a_staged_folder_replaces_an_older_one_as_a_whole(tmp_path: Path) -> None:
    final = _written_by_us(tmp_path / "out")
    with _io.staged_directory(final) as folder:
        (folder / "new").write_text("2")
        assert (final / "old").is_file()
    assert _names(final) == ["new"]
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ValueError("bug")])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_no_half_folder_and_the_old_one_whole(
    tmp_path: Path, error: BaseException, existing: bool
) -> None:
    final = tmp_path / "out"
    if existing:
        _written_by_us(final)

    def fill() -> None:
        with _io.staged_directory(final) as folder:
            (folder / "half").write_text("2")
            raise error

    with pytest.raises((KeyboardInterrupt, StorageError, ValueError)):
        fill()
    assert _names(tmp_path) == (["out"] if existing else [])
    assert not existing or (final / "old").read_text() == "1"


def test_a_file_that_somebody_puts_there_during_the_work_is_not_lost(tmp_path: Path) -> None:
    final = _written_by_us(tmp_path / "out")

    def work() -> None:
        with _io.staged_directory(final) as folder:
            (folder / "new").write_text("2")
            (final / "NOTES.md").write_text("mine")

    with pytest.raises(ConfigError, match=r"out holds other files: NOTES\.md,"):
        work()
    assert (final / "NOTES.md").read_text() == "mine"
    assert _names(tmp_path) == ["out"]


def _somebody_edits(folder: Path) -> None:
    (folder / "old").write_text("2")


def _somebody_adds(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "notes").write_text("mine")


def _somebody_links(folder: Path) -> None:
    (folder / "old").rename(folder.parent / "elsewhere")
    (folder / "old").symlink_to(folder.parent / "elsewhere")


def _somebody_lists(folder: Path) -> None:
    (folder / _io.FILE_LIST).write_text('{"schema": "files/1", "files": ["old"]}')


def _another_program_s(folder: Path) -> None:
    (folder / _io.FILE_LIST).unlink()
    (folder / "manifest.json").write_text('{"files": {"old": {}}}')


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_somebody_edits, "old,"),
        (_somebody_adds, "part/notes,"),
        (_somebody_links, "old,"),
        (_somebody_lists, "old,"),
        (_another_program_s, "manifest.json and 1 more,"),
    ],
)
def test_a_folder_with_what_we_did_not_write_so_is_refused_before_any_work(
    tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    change(final := _written_by_us(tmp_path / "out"))
    before = {file: file.read_text() for file in final.rglob("*") if file.is_file()}
    with (
        pytest.raises(ConfigError, match=rf"out holds other files: {named} .* would be replaced; move it away"),
        _io.staged_directory(final),
    ):
        pytest.fail("work was begun")
    assert {file: file.read_text() for file in final.rglob("*") if file.is_file()} == before


# ------------------------------------------------------------------------------------- where a name stands for another


def test_a_link_to_a_file_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "plan.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    _io.write_text(link, "new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_stays_and_its_target_is_replaced(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "disk" / "out", tmp_path / "link"
    target.parent.mkdir()
    if there:
        _written_by_us(target)
    link.symlink_to(target)
    with _io.staged_directory(link) as folder:
        (folder / "new").write_text("")
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_into_a_pipe_the_finished_file_is_written(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    _io.write_text(pipe, "plan")
    reader.join()
    assert got == ["plan"]
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_device_stays_one() -> None:
    before = os.stat(os.devnull)
    with _io.staged_file(Path(os.devnull)) as staged:
        staged.write_text("plan")
        assert staged.parent != Path(os.devnull).parent
    assert os.path.samestat(os.stat(os.devnull), before)
    assert not staged.exists()


def test_an_empty_mount_point_is_filled_and_another_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with _io.staged_directory(tmp_path) as folder:
        (folder / "new").write_text("")
        (folder / "more").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more", "new"]
    with (
        pytest.raises(StorageError, match=r"is a mount point that holds files; .*name a folder inside it"),
        _io.staged_directory(tmp_path),
    ):
        pytest.fail("work was begun")


@pytest.mark.skipif(os.name == "nt", reason="needs a mask for new files")
def test_new_files_and_folders_are_as_the_mask_has_them_and_old_ones_keep_their_mode(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("")
    old.chmod(0o640)
    mask = os.umask(0o077)
    try:
        _io.write_text(tmp_path / "new.json", "")
        _io.write_text(old, "")
        with _io.staged_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(mask)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new.json", "old.json", "folder")}
    assert modes == {"new.json": 0o600, "old.json": 0o640, "folder": 0o700}


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EDQUOT, errno.EROFS])
def test_a_refusal_in_the_words_of_a_rust_library_is_recognised_by_its_number(tmp_path: Path, code: int) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*run the same command again"), _io.storage_errors(tmp_path):
        raise RuntimeError(f"Error while serializing: I/O error: whatever (os error {code})")


def test_without_a_home_folder_it_is_said_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _io.cache_folder() == tmp_path / "sglp-deploy"

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ConfigError, match=r"no home folder is known; HOME is not set .*; set HOME, or XDG_CACHE_HOME"):
        _io.cache_folder()
