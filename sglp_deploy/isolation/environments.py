"""Isolated Python environments for runtimes that cannot share ours: each pins a torch and transformers of its own.

An environment is made on request (``sglp-deploy env create NAME``) from a pinned list that lies beside the format that
needs it (:class:`sglp_deploy.protocols.FormatFacts`).  It lives under the user's cache folder, in a folder whose name
carries the fingerprint of that list.  It is ready when its receipt is written.  That happens last.  A folder without
one was interrupted and is made again.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from sglp_deploy import _io, registry
from sglp_deploy._names import unknown_name
from sglp_deploy.errors import BackendError, ConfigError, MissingDependencyError
from sglp_deploy.isolation import children, lock
from sglp_deploy.protocols import EnvironmentSpec

SCHEMA: Final = "environment/1"  # history: 1 = first
_RECEIPT: Final = "sglp-environment.json"
_CREATE_TIMEOUT_S: Final = 3600.0
_PROBE_TIMEOUT_S: Final = 600.0  # the first import of a torch from a slow disk takes minutes
_LAST_LINES: Final = 8
_DIGITS: Final = 12  # of the fingerprint, in a folder's name

Say = Callable[[str], None]


class _Brought(Mapping[str, EnvironmentSpec]):
    """The environments that the registered formats bring, by name; nothing is imported before it is looked into."""

    def __getitem__(self, name: str) -> EnvironmentSpec:
        return registry.environments()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(registry.environments())

    def __len__(self) -> int:
        return len(registry.environments())


ENVIRONMENTS: Final[Mapping[str, EnvironmentSpec]] = _Brought()


def home() -> Path:
    """The folder all environments live in: ``$SGLP_DEPLOY_HOME``, else under the user's cache folder."""
    given = os.environ.get("SGLP_DEPLOY_HOME")
    if given:
        return Path(given).expanduser().absolute() / "environments"
    return _io.cache_folder() / "environments"


def variable(name: str) -> str:
    """The environment variable that names a user's own interpreter instead, for example ``SGLP_PYTHON_VLLM_CPU``."""
    return f"SGLP_PYTHON_{name.upper().replace('-', '_')}"


def spec_of(name: str) -> EnvironmentSpec:
    """The environment called ``name``.

    Raises:
        ConfigError: If there is none.
    """
    if name not in ENVIRONMENTS:
        raise unknown_name("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name]


def interpreter(environment: str | EnvironmentSpec) -> Path:
    """The Python of an environment that is ready, or the one the user named instead.

    Args:
        environment: Its name, or what goes into it; a format that passes its own has no other format loaded for it.

    Raises:
        ConfigError: If the name is unknown, or the user's own interpreter is not there.
        MissingDependencyError: If the environment has not been made; the message says how.
    """
    spec = environment if isinstance(environment, EnvironmentSpec) else spec_of(environment)
    name = spec.name
    own = os.environ.get(variable(name))
    if own:
        if not os.access(os.path.expanduser(own), os.X_OK):
            raise ConfigError(f"{variable(name)}={own} is not a program that can be run; correct it or unset it")
        return Path(own).expanduser().absolute()  # a worker is started in a folder of its own
    folder = _folder(spec)
    if _receipt(folder) is None:
        raise MissingDependencyError(
            f"the environment {name!r} is not there ({spec.why}); run 'sglp-deploy env create {name}' "
            f"({spec.size}, needs a network), or name an interpreter that has it in {variable(name)}"
        )
    return _python(folder)


def state(environment: str | EnvironmentSpec) -> str:
    """One line for people: "ready", "half-made", "not made", or the user's own interpreter."""
    spec = environment if isinstance(environment, EnvironmentSpec) else spec_of(environment)
    name = spec.name
    if own := os.environ.get(variable(name)):
        return f"your own: {own}"
    folder = _folder(spec)
    if _receipt(folder) is not None:
        return f"ready: {folder}"
    if folder.exists():
        return "half-made; 'env create' makes it again"
    older = [path.name for path in _made(name) if path != folder]
    return f"not made (there is an older one: {older[0]})" if older else "not made"


def create(name: str, *, say: Say = lambda _line: None, force: bool = False) -> Path:
    """Make the environment ``name`` if it is not ready; returns its interpreter.

    A second creator waits for the first one and then uses what it made.  A half-made environment is made again.

    Args:
        name: One of :data:`ENVIRONMENTS`.
        say: Called with one line for each step.
        force: Make it again although it is ready.

    Raises:
        ConfigError: If the name is unknown.
        BackendError: If a step fails; the message ends with pip's last words and says what to do without a network.
        StorageError: If the cache folder cannot be written.
    """
    spec = spec_of(name)
    folder = _folder(spec)
    with _io.storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(name, say):
            if _receipt(folder) is not None and not force:
                say(f"{name} is ready in {folder}")
                return _python(folder)
            if folder.exists():
                say(f"removing what is in {folder}")
                _delete(folder)
            _build(spec, folder, say)
    return _python(folder)


def remove(name: str) -> list[Path]:
    """Delete every environment called ``name``, older lists included; returns the folders that went.

    Waits for a process that is making one.
    """
    spec_of(name)
    if not _made(name):
        return []
    with _locked(name, lambda _line: None):
        gone = _made(name)
        for folder in gone:
            _delete(folder)
    return gone


def _delete(folder: Path) -> None:
    """The receipt first: what a stop in the middle leaves must not read as ready."""
    (folder / _RECEIPT).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _build(spec: EnvironmentSpec, folder: Path, say: Say) -> None:
    say(f"making {spec.name} in {folder} ({spec.size})")
    python = str(_python(folder))
    if importlib.util.find_spec("pip") is None:  # ours was made by a tool that brings none
        _step(spec, [sys.executable, "-m", "venv", str(folder)], "making the environment")
        pip = [python, "-m", "pip"]
    else:  # our own pip installs into it; an environment without pip is made at once
        _step(spec, [sys.executable, "-m", "venv", "--without-pip", str(folder)], "making the environment")
        pip = [sys.executable, "-m", "pip", "--python", python]
    for requirements in spec.install:
        say(f"installing {' '.join(requirements)}")
        _step(spec, [*pip, "install", "--disable-pip-version-check", *requirements], "pip install")
    if spec.remove:
        _step(spec, [*pip, "uninstall", "--yes", "--quiet", *spec.remove], "pip uninstall")
    for distribution, version in (spec.stub_metadata or {}).items():
        _write_metadata(python, distribution, version)
    say(f"checking: {spec.probe}")
    probe(spec, Path(python))
    frozen = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True)
    _io.write_json(
        folder / _RECEIPT,
        {
            "schema": SCHEMA,
            "name": spec.name,
            "fingerprint": spec.fingerprint(),
            "python": platform.python_version(),
            "packages": frozen.stdout.split("\n")[:-1],
        },
    )
    say(f"{spec.name} is ready")


def probe(spec: EnvironmentSpec, python: Path) -> None:
    """Run the environment's probe with ``python``.

    Raises:
        BackendError: If it fails or hangs; the message ends with its last words.
    """
    advice = (
        "what was installed does not run on this machine; look at the last line, and name an interpreter in which it "
        f"does in {variable(spec.name)}"
    )
    _step(spec, [str(python), "-c", spec.probe], "the check", advice=advice, timeout_s=_PROBE_TIMEOUT_S)


def _step(
    spec: EnvironmentSpec,
    command: Sequence[str],
    what: str,
    *,
    advice: str = "",
    timeout_s: float = _CREATE_TIMEOUT_S,
) -> None:
    advice = advice or (
        "without a network, point pip at a folder of wheels (PIP_FIND_LINKS, PIP_NO_INDEX=1), or name an interpreter "
        f"that has it in {variable(spec.name)}"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    try:
        done = children.run(command, environment=clean, timeout_s=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise BackendError(
            f"{what} for the environment {spec.name!r} took more than {timeout_s:g} s and was stopped; a slow "
            f"network or disk can be the reason; {advice}"
        ) from error
    if done.returncode:
        last = "\n  ".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-_LAST_LINES:])
        raise BackendError(
            f"{what} for the environment {spec.name!r} failed (exit {done.returncode}); {advice}\n  {last}"
        )


def _write_metadata(python: str, distribution: str, version: str) -> None:
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(found.stdout.strip()) / f"{distribution}-{version}.dist-info"
    _io.write_text(folder / "METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def _folder(spec: EnvironmentSpec) -> Path:
    return home() / f"{spec.name}-{spec.fingerprint()[:_DIGITS]}"


def _made(name: str) -> list[Path]:
    """Folders of every list there ever was for ``name``; by the whole name, because "vllm" begins "vllm-cpu" too."""
    return [path for path in sorted(home().glob(f"{name}-{'[0-9a-f]' * _DIGITS}")) if path.is_dir()]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a finished environment; None when it is missing, damaged or its interpreter is gone."""
    try:
        value = _io.parse_json((folder / _RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(value, dict) and value.get("schema") == SCHEMA and os.access(_python(folder), os.X_OK)
    return value if whole else None


def _locked(name: str, say: Say) -> AbstractContextManager[None]:
    """Hold the environments called ``name``; wait for another process that does."""
    return lock.held(home() / f"{name}.lock", busy=lambda: say("another process is making it; waiting"))
