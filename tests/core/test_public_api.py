from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sglp_deploy

ROOT = Path(sglp_deploy.__file__).parent
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "optimum", "datasets")


def _loaded_after(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after ``statement``."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; {statement}; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", sglp_deploy.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(sglp_deploy, name) is not None
    assert name in dir(sglp_deploy)


def test_names_for_type_checkers_are_the_names_at_run_time() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    guarded = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglp_deploy.")
        for alias in node.names
    }
    assert guarded | {"__version__"} == set(sglp_deploy.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'sglp_deploy' has no attribute 'Copressor'"):
        sglp_deploy.Copressor  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert _loaded_after("import sglp_deploy") == set()


def test_runtimes_report_their_use_only_where_the_user_says_so() -> None:
    names = ("ORT_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    code = f"import os, sglp_deploy; print(*[os.environ[name] for name in {names!r}])"
    own = {name: value for name, value in os.environ.items() if name not in names}
    own["PYTHONPATH"] = os.pathsep.join(sys.path)
    for given, said in (({}, "1 1 1 1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 1 1 1")):
        run = subprocess.run([sys.executable, "-c", code], env=own | given, capture_output=True, text=True, check=True)
        assert run.stdout.split() == said.split()


def test_planning_and_reading_an_artifact_need_numpy_only() -> None:
    statement = (
        "from sglp_deploy import Budget, ExportArtifact, LayerStats, PruningPlan, Segmentation, SimilarityMatrix"
    )
    assert _loaded_after(statement) == set()


def test_importing_exporters_loads_no_runtime() -> None:
    statement = "import sglp_deploy.registry, sglp_exporters.onnx, sglp_exporters.checkpoint"
    assert not _loaded_after(statement) & {"onnx", "onnxruntime", "onnx_ir", "transformers"}
