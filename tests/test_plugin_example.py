"""A third party's exporter, as a third party would ship it: installed by pip, used by name, taught by the docs page."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import tiny
from installing import pip_install
from sglp_bench.measure.timeable import reason_not_timed
from sglp_bench.workloads.generate import Workload
from sglp_deploy import _io, registry
from sglp_deploy.artifact import MANIFEST, ExportArtifact
from sglp_deploy.cli.main import main
from sglp_deploy.errors import BackendError, ConfigError, UnsupportedModelError
from sglp_deploy.protocols import FormatFacts

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin_example"
PAGE = (ROOT / "docs" / "writing-an-exporter.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SOURCES = {"toml": EXAMPLE / "pyproject.toml", "python": EXAMPLE / "sglp_torch_export.py"}
MODULE = "sglp_torch_export"


def blocks(language: str, *, quoted: bool = False) -> list[str]:
    """The page's blocks in ``language``: those that quote the example, or those that are to be run."""
    source = SOURCES[language].read_text(encoding="utf-8") if language in SOURCES else ""
    return [text for found, text in BLOCKS if found == language and (text in source) == quoted]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Where a reader of the page stands, after every command of it; and what each verb printed."""
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed} in this environment")
    here = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, here / "examples" / EXAMPLE.name)  # pip builds inside the source folder
    tiny.save_tiny(here / "model")
    printed: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.syspath_prepend(str(here / "site"))
        for line in "".join(blocks("sh")).splitlines():
            program, *arguments = shlex.split(line, comments=True)
            if program == "pip":
                assert arguments[0] == "install"
                pip_install(Path(arguments[1]), here / "site")
                continue
            assert program == "sglp-deploy"
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                assert main([*arguments, "-q"]) == 0, line
            printed[arguments[0]] = stream.getvalue()
        yield here, printed
    sys.modules.pop(MODULE, None)


@pytest.fixture
def plugin(folder: tuple[Path, dict[str, str]]) -> ModuleType:
    return importlib.import_module(MODULE)


def test_the_page_quotes_the_example_word_for_word() -> None:
    assert len(blocks("toml", quoted=True)) == 1
    assert blocks("toml") == []
    assert len(blocks("python", quoted=True)) == 5
    assert len(blocks("python")) == 1
    assert {language for language, _ in BLOCKS} == {"toml", "python", "sh"}


def test_the_page_points_at_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_installed_package_is_listed_with_its_version(folder: tuple[Path, dict[str, str]]) -> None:
    line = next(line for line in registry.plugins() if line.name == "torch-export")
    assert line == registry.PluginInfo("torch-export", f"{MODULE}:TorchExportExporter", "0.1.0", None)
    assert re.search(r"^exporter +torch-export +0\.1\.0 +yes ", folder[1]["plugins"], re.MULTILINE)


def test_the_commands_of_the_page_end_in_a_certificate_that_passed(folder: tuple[Path, dict[str, str]]) -> None:
    here, printed = folder
    report = json.loads((here / "parity.json").read_text(encoding="utf-8"))
    assert report["format"] == "torch-export"
    assert report["reasons"] == []
    assert len(report["cases"]) == 4
    assert all(case["passed"] for case in report["cases"])
    assert "parity PASSED" in printed["verify"]
    assert "parity PASSED" in printed["show"]


def test_run_would_measure_it_and_it_names_the_package_it_depends_on(folder: tuple[Path, dict[str, str]]) -> None:
    artifact = ExportArtifact.load(folder[0] / "program")
    assert reason_not_timed(artifact, Workload.named("smoke")) is None
    assert registry.facts("torch-export") == FormatFacts(packages=("torch",))


def test_the_code_of_the_page_runs(folder: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder[0])
    (code,) = blocks("python")
    exec(compile(code, "writing-an-exporter.md", "exec"), {"__name__": "page"})


def test_a_weight_altered_after_the_export_fails_the_certificate(
    folder: tuple[Path, dict[str, str]], plugin: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = torch.export.load(folder[0] / "program" / plugin.FILE)
    name = next(name for name in program.state_dict if name.endswith("layers.2.input_layernorm.weight"))
    with torch.no_grad():
        program.state_dict[name].mul_(1.01)
    shutil.copytree(folder[0] / "program", tmp_path / "altered")
    torch.export.save(program, tmp_path / "altered" / plugin.FILE)
    manifest = tmp_path / "altered" / MANIFEST
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    file = tmp_path / "altered" / plugin.FILE
    facts["files"][plugin.FILE] = {"sha256": _io.sha256_file(file), "bytes": file.stat().st_size}
    manifest.write_text(json.dumps(facts), encoding="utf-8")
    assert main(["verify", str(tmp_path / "altered"), "--model", str(folder[0] / "model"), "-q"]) == 3
    assert "parity FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_the_program_runs_without_transformers_and_without_this_package(folder: tuple[Path, dict[str, str]]) -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['sglp_deploy'] = None\n"
        "import torch; program = torch.export.load('program/model.pt2').module(check_guards=False)\n"
        "ids = torch.tensor([[5, 6, 7]]); mask = torch.ones_like(ids)\n"
        "logits, cache = program(ids, mask, mask.cumsum(-1) - 1, mask[:, :0], [torch.zeros(1, 2, 0, 32)] * 8)\n"
        "print(*logits.shape, len(cache), *cache[0].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder[0], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["1", "3", str(tiny.VOCAB_SIZE), "8", "1", "2", "3", "32"], done.stderr


def test_the_cache_is_declared_as_the_pruned_model_keeps_it(folder: tuple[Path, dict[str, str]]) -> None:
    artifact = ExportArtifact.load(folder[0] / "program")
    kept = [(spec.name, spec.dtype, spec.shape) for spec in artifact.inputs[4:]]
    shape = ("batch", 2, "past", 32)
    assert kept == [(f"past_key_values.{n}.{part}", "float32", shape) for n in range(4) for part in ("key", "value")]


def test_options_and_devices_it_does_not_know_are_refused(
    folder: tuple[Path, dict[str, str]], plugin: ModuleType, tmp_path: Path
) -> None:
    exporter = registry.exporter("torch-export")
    model: object = None  # never looked at
    with pytest.raises(ConfigError, match="exporter 'torch-export' does not know opset; leave it out"):
        exporter.export(model, tmp_path / "out", opset=17)  # type: ignore[arg-type]
    artifact = ExportArtifact.load(folder[0] / "program")
    with pytest.raises(ConfigError, match="is for the CPU, not for 'cuda'; pass --device cpu"):
        exporter.open(artifact, device="cuda")
    with pytest.raises(ConfigError, match="thread"):
        exporter.open(artifact, thread=1)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_cache_is_refused_by_name(plugin: ModuleType) -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no key-value cache; it is no decoder language model"):
        plugin.cache_specs(torch.nn.Linear(2, 2), "past_key_values", "past")


def test_a_model_that_cannot_be_traced_is_refused_by_name(plugin: ModuleType) -> None:
    with pytest.raises(BackendError, match=r"torch\.export cannot trace Linear; .+; run again with -v to see why"):
        plugin.trace(torch.nn.Linear(2, 2), [])


def test_the_runner_restores_the_threads_and_refuses_to_decode_before_a_prefill(
    folder: tuple[Path, dict[str, str]],
) -> None:
    before = torch.get_num_threads()
    artifact = ExportArtifact.load(folder[0] / "program")
    with registry.exporter("torch-export").open(artifact, threads=before + 1) as runner:
        assert torch.get_num_threads() == before + 1
        with pytest.raises(BackendError, match="decode was called before prefill"):
            runner.decode(np.array([1]))  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before
