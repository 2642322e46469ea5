"""What formats declare of themselves: found beside each exporter, ours and others', without loading a runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from sglp_deploy import registry
from sglp_deploy.cli.main import main
from sglp_deploy.errors import MissingDependencyError
from sglp_deploy.isolation import environments
from sglp_deploy.protocols import FormatFacts

PLUGIN = """
from sglp_deploy.protocols import EnvironmentSpec, FormatFacts

def made(name, version):
    return EnvironmentSpec(name, "it is a test", ((f"toy=={version}",),), "import toy", "1 MB")

class Silent:
    name = "silent"
    requires = ()
    def export(self, model, out_dir, **options): ...
    def open(self, artifact, **options): ...

class Toy(Silent):
    facts = FormatFacts(
        environments=(made("toy-cpu", 1), made("toy", 2), made("gguf", 3)),
        environment="toy-cpu",
        cuda_environment="toy",
        packages=("toy-runtime",),
    )

class Guest(Silent):
    facts = FormatFacts(environment="toy-cpu")

class Wrong(Silent):
    facts = {"environment": "toy"}
"""


@pytest.fixture
def _theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_formats.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_formats", raising=False)
    targets = {"silent": "Silent", "toy": "Toy", "guest": "Guest", "wrong": "Wrong"}
    entries = [metadata.EntryPoint(name, f"their_formats:{cls}", registry.GROUP) for name, cls in targets.items()]
    entries.append(metadata.EntryPoint("gone", "no_such_module:Thing", registry.GROUP))
    real = metadata.entry_points

    def entry_points(**parameters: Any) -> Any:
        return entries if parameters == {"group": registry.GROUP} else real(**parameters)

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_a_format_names_one_environment_for_each_kind_of_device() -> None:
    facts = registry.facts("vllm")
    named = {device: facts.environment_on(device) for device in ("cpu", "cuda", "cuda:1")}
    assert {device: getattr(spec, "name", spec) for device, spec in named.items()} == {
        "cpu": "vllm-cpu",
        "cuda": "vllm",
        "cuda:1": "vllm",
    }
    for device in ("cpu", "cuda"):
        assert getattr(registry.facts("gguf").environment_on(device), "name", None) == "gguf"
        assert registry.facts("onnx").environment_on(device) is None


def test_every_environment_lies_beside_a_format() -> None:
    brought = {name: {spec.name for spec in registry.facts(name).environments} for name in registry.BUILTIN}
    assert {name: found for name, found in brought.items() if found} == {
        "executorch": {"executorch"},
        "gguf": {"gguf"},
        "optimum": {"optimum"},
        "tensorrt": {"modelopt"},
        "tensorrt-kit": {"modelopt"},
        "vllm": {"vllm-cpu", "vllm"},
    }


@pytest.mark.usefixtures("_theirs")
def test_a_third_party_s_environment_is_listed_and_asked_for_like_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLP_DEPLOY_HOME", str(tmp_path / "home"))
    assert main(["env", "list", "-q", "--json"]) == 0
    listed = {line["name"]: line for line in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert listed["toy-cpu"] == {"name": "toy-cpu", "state": "not made", "size": "1 MB", "why": "it is a test"}
    assert set(listed) == {"executorch", "gguf", "modelopt", "optimum", "toy", "toy-cpu", "vllm", "vllm-cpu"}
    assert listed["gguf"]["why"] != "it is a test"  # a name of ours is not taken
    spec = registry.facts("toy").environment_on("cuda:0")
    assert not isinstance(spec, str | None)
    for asked in ("toy", spec):
        with pytest.raises(MissingDependencyError, match=r"'toy' is not there \(it is a test\); run 'sglp-deploy env"):
            environments.interpreter(asked)
        assert environments.state(asked) == "not made"


@pytest.mark.usefixtures("_theirs")
def test_a_format_may_live_in_another_format_s_environment() -> None:
    assert registry.facts("guest").environment_on("cuda") == "toy-cpu"
    assert environments.state("toy-cpu") == "not made"


@pytest.mark.usefixtures("_theirs")
def test_a_format_that_declares_nothing_or_cannot_be_loaded_has_the_defaults() -> None:
    for name in ("silent", "gone", "wrong", "unheard-of"):
        assert registry.facts(name) == FormatFacts() == FormatFacts((), None, None, ())


@pytest.mark.usefixtures("_theirs")
def test_facts_of_another_type_are_refused_by_name() -> None:
    message = r"exporter 'wrong' .* TypeError: facts of Wrong is a dict, not FormatFacts; reinstall the package"
    with pytest.raises(MissingDependencyError, match=message):
        registry.exporter("wrong")
    reasons = {line.name: line.reason for line in registry.plugins()}
    assert reasons["wrong"] == "broken: TypeError: facts of Wrong is a dict, not FormatFacts"
    assert reasons["toy"] is None


def test_listing_the_environments_loads_no_runtime() -> None:
    code = (
        "import sys\nfrom sglp_deploy.cli.main import main\n"
        "assert main(['env', 'list', '-q']) == 0\n"
        "from sglp_deploy import registry\n"
        "for name in registry.BUILTIN: registry.facts(name)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino', 'gguf'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli_runs.environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
