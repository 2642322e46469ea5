"""Files that are whole or absent: atomic writes, digests and the schema check every format shares."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # the module is asked for before each use

from sglp_deploy.errors import ArtifactError, ConfigError, StorageError

_CHUNK_BYTES = 1 << 20
_ALIVE = ".alive"  # in a scratch folder; locked while its owner lives
# What a folder of ours lists its files in, each with its digest, and what the schema of such a list begins with.
FILE_LIST = "sglp_files.json"
_LISTS = {"manifest.json": "artifact/", FILE_LIST: "files/"}
_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}  # which file managers leave in every folder
CERTIFICATE = "parity.json"  # what verifying leaves in an artifact's folder


def canonical_json(value: Any) -> str:
    """The one spelling of ``value`` that digests are taken over: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Tuples and mappings as the lists and dictionaries of JSON."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# Refusals of the operating system to write, as opposed to a mistake in our own arguments.
_WRITE_REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
}


_RUST_CODE = re.compile(r"\(os error (\d+)\)")  # how Rust's libraries say errno


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into a :class:`StorageError` that says what to do.

    Rust and C++ writers (safetensors, ONNX) report a full disk in words of their own; those are recognised too.
    """
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code is None and (rust := _RUST_CODE.search(str(error))):
            code = int(rust[1])
        full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
        if not full and code not in _WRITE_REFUSALS:
            raise
        reason = "no space left on the device" if full else os.strerror(code or 0)
        advice = "free some space" if full else "check the folder's permissions"
        raise StorageError(f"cannot write {path}; {reason}; {advice} and run the same command again") from error


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """A path to write one file to, that takes its final name only when the block ends without an error.

    A link stays, and what it points to is replaced.  Into a device or a pipe the finished file is written.

    Raises:
        StorageError: If the disk is full or the folder cannot be written; an older file stays as it was.
    """
    with storage_errors(final):
        final = final.resolve()
        through = final.exists() and not final.is_file()  # a device or a pipe; a folder refuses to be written to
        place = Path(tempfile.gettempdir()) if through else final.parent
        place.mkdir(parents=True, exist_ok=True)
        staged = place / f".{final.name}.{secrets.token_hex(4)}.tmp"
        # Not a private file of tempfile's: ours are as the user's mask has them.
        os.close(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield staged
            if through:
                with staged.open("rb") as source, final.open("wb") as target:
                    shutil.copyfileobj(source, target)
                staged.unlink()
            else:
                if final.exists():
                    shutil.copymode(final, staged)
                _fsync(staged)
                os.replace(staged, final)
                _fsync(final.parent)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically: temporary file, fsync, rename, fsync of the folder.

    Raises:
        StorageError: If the disk is full or the folder cannot be written; an older file stays as it was.
    """
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and Infinity are refused (``ValueError``)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str, *, ours: bool = True) -> Any:
    """What JSON says.

    Args:
        text: The file's content.
        ours: Hold it to what we write: no NaN and no infinity, which configurations of models may have.

    Raises:
        ValueError: If it is not JSON, nests too deeply, or holds a number of thousands of digits; of ours also where a
            number is not finite or beyond 64 bits, or a letter is half a surrogate pair.
    """
    try:
        if not ours:
            return json.loads(text)
        value = json.loads(text, parse_constant=_no_number, parse_int=_of_64_bits)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    return value


def _of_64_bits(word: str) -> int:
    if len(word) > len(str(-(2**63))) or not -(2**63) <= int(word) < 2**63:
        raise ValueError(f"{word[:20]}... is beyond 64 bits")
    return int(word)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def read_json(path: Path, kind: str, versions: Sequence[int] = (1,)) -> dict[str, Any]:
    """Read one of our files and check that it is a ``kind`` in one of the ``versions`` this code knows.

    Raises:
        ArtifactError: If the file is missing, is not JSON, or carries another ``schema``.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing = f"{path} does not exist; one of our {kind} files was expected there; check the path"
        raise ArtifactError(missing) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a {kind} file; {error}; make it again") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    wanted = [f"{kind}/{version}" for version in versions]
    if schema not in wanted:
        known = " and ".join(map(repr, wanted))
        raise ArtifactError(f"{path} has schema {schema!r}; this version reads {known}; make the file again")
    return dict(value)


def inside(root: Path, relative: str) -> Path:
    """``root / relative``, refused when it would leave ``root`` (names come from files we did not write).

    Raises:
        ArtifactError: If ``relative`` is absolute or climbs out of ``root``.
    """
    target = (root / relative).resolve()
    if not target.is_relative_to(root.resolve()) or Path(relative).is_absolute():
        raise ArtifactError(f"{relative!r} points outside {root}; a file name may not leave its folder; do not use it")
    return target


@contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A folder to fill that takes its final name only when the block ends without an error.

    An older folder of that name stays until the new one is complete, then is replaced.  A link stays, and what it
    points to is replaced.  An empty mount point is filled.  On any failure, an interrupt included, the half-made folder
    is removed and the older one is untouched.

    Raises:
        ConfigError: If the older folder holds a file that no list of ours names as it is now.
        StorageError: If the operating system refuses a write, or the folder is a mount point and not empty.
    """
    refuse_foreign(final)
    with storage_errors(final):
        final = final.resolve()
        mounted = final.is_dir() and os.path.ismount(final)
        if mounted and any(final.iterdir()):
            raise StorageError(
                f"{final} is a mount point that holds files; it cannot be replaced as a whole; name a folder inside it"
            )
        place = final if mounted else final.parent
        place.mkdir(parents=True, exist_ok=True)
        staging = place / f".{final.name}.{secrets.token_hex(4)}.partial"
        staging.mkdir()
        try:
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    _fsync(file)
            if mounted:
                for entry in sorted(staging.iterdir()):
                    os.replace(entry, final / entry.name)
                staging.rmdir()
            else:
                refuse_foreign(final)  # somebody may have put files there while we worked
                _take_place(staging, final)
            _fsync(place)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """A folder for the time being, in the system's temporary folder.

    It goes when the block ends.  Those of killed processes go at the next such block: a living owner holds a lock on a
    file in its own, on systems that have such locks.
    """
    prefix = f"sglp-{purpose}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        folder = Path(name)
        with (folder / f"{_ALIVE}.tmp").open("w") as file:
            if fcntl is not None:
                with suppress(OSError):  # without locks on this disk the folder is nobody's to sweep
                    fcntl.flock(file, fcntl.LOCK_EX)
                    os.replace(file.name, folder / _ALIVE)  # locked before it can be seen
            yield folder


def _is_abandoned(folder: Path) -> bool:
    """Whether nobody holds a scratch folder any more; False where that cannot be told."""
    try:
        if fcntl is None or folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        with (folder / _ALIVE).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # held, gone meanwhile, or without such a file
        return False


def cache_folder() -> Path:
    """Where we keep what can be made again: below ``$XDG_CACHE_HOME``, else the user's ``.cache``.

    Raises:
        ConfigError: If neither is known.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(given) if given else Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(
            "no home folder is known; HOME is not set and the system has no entry for this user; set HOME, or "
            "XDG_CACHE_HOME to a folder for what can be made again"
        ) from error
    return cache / "sglp-deploy"


def json_of(file: Path, *, ours: bool = True) -> Any:
    """What a JSON file says, see :func:`parse_json`; None where it is absent or cannot be read."""
    try:
        return parse_json(file.read_text(encoding="utf-8"), ours=ours)
    except (OSError, ValueError):
        return None


def has_schema(file: Path, schema: str) -> bool:
    """Whether a file is JSON of ours of a kind ("artifact/"), of any version; others call theirs the same."""
    value = json_of(file)
    return isinstance(value, dict) and str(value.get("schema", "")).startswith(schema)


def write_file_list(folder: Path) -> None:
    """List every file in ``folder`` with its digest, so that a later replacement can tell what was put there by us."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).as_posix() not in _LISTS
    }
    write_json(folder / FILE_LIST, {"schema": "files/1", "files": files})


def foreign_files(folder: Path) -> list[str]:
    """Files in a folder that no list of ours in it names with the digest they have, by path below it.

    A folder without such a list is foreign as a whole.
    """
    listed: dict[str, Any] = {}
    lists = set()
    for name, schema in _LISTS.items():
        if has_schema(folder / name, schema):
            lists.add(name)
            files = json_of(folder / name).get("files")
            listed |= files if isinstance(files, dict) else {}

    def ours(file: Path) -> bool:
        name = file.relative_to(folder).as_posix()
        if name in lists or (name == CERTIFICATE and has_schema(file, "parity/")) or name in _OF_THE_SYSTEM:
            return True
        record = listed.get(name)
        if file.is_symlink() or not file.is_file() or not isinstance(record, dict):
            return False
        return record.get("bytes") == file.stat().st_size and record.get("sha256") == sha256_file(file)

    entries = [entry for entry in sorted(folder.rglob("*")) if entry.is_symlink() or not entry.is_dir()]
    return [entry.relative_to(folder).as_posix() for entry in entries if not ours(entry)]


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace a folder that holds what is not ours.

    Raises:
        ConfigError: Naming the first such file.
    """
    if folder.is_dir() and not os.path.ismount(folder) and (foreign := foreign_files(folder)):
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise ConfigError(
            f"{folder} holds other files: {foreign[0]}{more}, of which no list of ours says that it wrote them so; the "
            "whole folder would be replaced; move it away, or choose another output"
        )


def _take_place(staging: Path, final: Path) -> None:
    """Give a finished folder its name; an older one of that name goes, or is back if that fails."""
    if not final.exists():
        os.replace(staging, final)
        return
    outgoing = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".old"))
    os.replace(final, outgoing / final.name)
    try:
        os.replace(staging, final)
    except BaseException:
        os.replace(outgoing / final.name, final)
        raise
    shutil.rmtree(outgoing, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; a rename is only there for good with its folder."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and keeps renames by itself
    # Windows brings to the disk only what is open for writing.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
