"""What the vLLM runner asks of vLLM, without vLLM: which device, how much of it, and that nobody times it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import sglp_exporters
from exports import compressed
from sglp_deploy.isolation import environments, workers
from sglp_exporters.vllm import runner as vllm_runner
from sglp_exporters.vllm.exporter import VllmExporter
from sglp_exporters.vllm.runner import VllmRunner

WORKER = Path(sglp_exporters.__file__).parent / "vllm" / "worker.py"
SETTINGS = (
    "HF_HUB_OFFLINE",
    "VLLM_NO_USAGE_STATS",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_CPU_KVCACHE_SPACE",
    "TRITON_F32_DEFAULT",
)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The worker's module; what it sets for its own process is taken back."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv("SGLP_WORKER_LOOP", str(workers._LOOP_FOLDER))
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("vllm_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _start(worker: ModuleType, monkeypatch: pytest.MonkeyPatch, *, memory: tuple[int, int] | None) -> dict[str, Any]:
    """Options vLLM is started with on a machine without a GPU, or with one of (free, total) bytes."""
    asked: dict[str, Any] = {}

    def llm(**options: Any) -> Any:
        asked.update(options)
        settings = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=3, block_size=32),
            model_config=SimpleNamespace(get_vocab_size=lambda: 256),
        )
        return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=settings))

    cuda = SimpleNamespace(is_available=lambda: memory is not None, mem_get_info=lambda: memory)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm, __version__="0"))
    assert worker.start("folder", "float32", 512)["kv_cache_tokens"] == 96
    return asked


def test_on_a_gpu_vllm_takes_of_what_is_free_and_not_of_everything(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference lies on the same device; vLLM's own default, 92 % of all of it, would refuse to start."""
    asked = _start(worker, monkeypatch, memory=(30, 80))
    assert asked["gpu_memory_utilization"] * 80 < 30
    assert "gpu_memory_utilization" not in _start(worker, monkeypatch, memory=None)


def test_float32_is_computed_with_all_its_bits(worker: ModuleType) -> None:
    assert worker.os.environ["TRITON_F32_DEFAULT"] == "ieee"


@pytest.mark.parametrize(
    ("device", "visible", "wanted"),
    [
        ("cpu", None, {}),
        ("cuda", "3,5", {}),
        ("cuda:1", None, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("cuda:1", "3,5", {"CUDA_VISIBLE_DEVICES": "5"}),
        ("cuda:1", "GPU-aa,GPU-bb", {"CUDA_VISIBLE_DEVICES": "GPU-bb"}),
    ],
)
def test_the_device_that_was_asked_for_is_the_only_one_vllm_sees(
    device: str, visible: str | None, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert vllm_runner._device_environment(device) == wanted


def test_its_runner_takes_the_device_along_and_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = VllmExporter().export(compressed("llama", (0, 2)), tmp_path / "vllm")
    for name in ("vllm", "vllm-cpu"):
        monkeypatch.setenv(environments.variable(name), sys.executable)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runner = VllmExporter().open(artifact, device="cuda:1", threads=2)
    assert isinstance(runner, VllmRunner)
    assert runner._worker._environment == {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2"}
    assert "measure the folder with vLLM's own benchmark" in runner.not_timed
