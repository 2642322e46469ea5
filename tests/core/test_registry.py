from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sglp_deploy import registry
from sglp_deploy.errors import ExporterNotFoundError, MissingDependencyError
from sglp_deploy.protocols import Exporter

PLUGIN = """
class Good:
    name = "good"
    requires = ("json",)
    def export(self, model, out_dir, **options): ...
    def open(self, artifact, **options): ...

class Needy(Good):
    name = "needy"
    requires = ("json", "surely_not_installed", "surely_not.either")

class Shapeless:
    name = "shapeless"

class Angry(Good):
    def __init__(self):
        raise RuntimeError("no licence found")
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's entry points, one for each way a plugin can be."""
    (tmp_path / "their_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_plugin", raising=False)
    targets = {
        "good": "their_plugin:Good",
        "needy": "their_plugin:Needy",
        "shapeless": "their_plugin:Shapeless",
        "angry": "their_plugin:Angry",
        "gone": "no_such_module:Thing",
        "onnx": "their_plugin:Good",
    }
    entries = [metadata.EntryPoint(name, target, registry.GROUP) for name, target in targets.items()]
    real = metadata.entry_points

    def entry_points(**parameters: Any) -> Any:
        return entries if parameters == {"group": registry.GROUP} else real(**parameters)

    monkeypatch.setattr(metadata, "entry_points", entry_points)


BUILTIN = (
    "executorch",
    "gguf",
    "onnx",
    "openvino",
    "optimum",
    "ort-genai",
    "tensorrt",
    "tensorrt-kit",
    "torch",
    "vllm",
)


@pytest.mark.parametrize("name", ["onnx", "torch", "vllm"])
def test_built_in_exporters_are_found_under_their_names(name: str) -> None:
    made = registry.exporter(name)
    assert isinstance(made, Exporter)
    assert made.name == name


def test_an_unknown_name_gets_the_nearest_match_and_the_list() -> None:
    with pytest.raises(ExporterNotFoundError) as caught:
        registry.exporter("onx")
    assert str(caught.value) == (
        f"there is no exporter 'onx'; did you mean 'onnx'? known: {', '.join(BUILTIN)}; 'sglp-deploy plugins' says more"
    )
    with pytest.raises(ExporterNotFoundError, match=r"there is no exporter 'zzz'; known: executorch"):
        registry.exporter("zzz")


@pytest.mark.usefixtures("theirs")
def test_a_third_party_exporter_is_used_like_ours() -> None:
    assert registry.exporter("good").name == "good"


@pytest.mark.usefixtures("theirs")
def test_a_third_party_may_not_take_a_built_in_name() -> None:
    assert type(registry.exporter("onnx")).__module__ == "sglp_exporters.onnx.exporter"
    assert registry.shadowed() == ["onnx (their_plugin:Good)"]


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needy", "needs surely_not_installed, surely_not.either; not installed here; pip install surely_not_inst"),
        ("shapeless", "cannot be loaded; TypeError: Shapeless lacks one of name, requires, export, open; reinstall"),
        ("angry", r"\(their_plugin:Angry\) cannot be loaded; RuntimeError: no licence found; reinstall the package"),
        ("gone", "cannot be loaded; ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_an_exporter_that_cannot_be_used_says_why(name: str, message: str) -> None:
    with pytest.raises(MissingDependencyError, match=message):
        registry.exporter(name)


@pytest.mark.usefixtures("theirs")
def test_the_list_holds_every_plugin_and_no_broken_one_breaks_it() -> None:
    lines = {line.name: line for line in registry.plugins()}
    assert sorted(lines) == sorted(["angry", "gone", "good", "needy", "shapeless", *BUILTIN])
    assert lines["good"].reason is None
    assert lines["onnx"].reason is None
    assert lines["onnx"].origin == "sglp_exporters.onnx.exporter:OnnxExporter"
    assert lines["needy"].reason == "needs surely_not_installed, surely_not.either"
    assert lines["angry"].reason == "broken: RuntimeError: no licence found"
    assert lines["gone"].reason == "broken: ModuleNotFoundError: No module named 'no_such_module'"
    assert lines["good"].version == "unknown"


def test_ours_have_the_version_of_the_installed_distribution_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"sglp-deploy": "7.8.9"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    def shown() -> set[str]:
        return {line.version for line in registry.plugins() if line.name in BUILTIN}

    monkeypatch.setattr(registry.metadata, "version", version)
    assert shown() == {"7.8.9"}
    installed.clear()
    assert shown() == {"unknown"}


@pytest.mark.usefixtures("theirs")
def test_an_output_folder_is_not_taken_for_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surely_not_installed").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match="surely_not_installed"):
        registry.exporter("needy")


def test_a_missing_need_of_ours_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Described:
        def get_all(self, key: str) -> list[str]:
            assert key == "Provides-Extra"
            return ["gpu", "onnx"]

    monkeypatch.setattr(metadata, "metadata", lambda name: Described())
    monkeypatch.setattr(registry, "_importable", lambda package: package != "onnxruntime")
    with pytest.raises(MissingDependencyError) as caught:
        registry.exporter("onnx")
    assert str(caught.value) == (
        "exporter 'onnx' needs onnxruntime; not installed here; pip install 'sglp-deploy[onnx]'"
    )
