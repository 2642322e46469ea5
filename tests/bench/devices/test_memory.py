import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sglp_bench.devices import memory
from sglp_bench.devices.memory import MemoryReading, device_readings, idle_host, peak_host


def fake_proc(root: Path, entries: dict[str, str]) -> Path:
    for name, status in entries.items():
        (root / name).mkdir(parents=True)
        (root / name / "status").write_text(status)
    return root


STATUS = "Name:\tpython\nVmPeak:\t 9000 kB\nVmHWM:\t  700 kB\nVmRSS:\t  500 kB\n"


def test_idle_and_peak_come_from_their_own_lines_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_descendants", list)
    proc = fake_proc(tmp_path, {"self": STATUS})
    assert idle_host(proc) == MemoryReading("VmRSS", 500 * 1024)
    assert peak_host(proc) == MemoryReading("VmHWM", 700 * 1024)


def test_the_peaks_of_living_children_are_added_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_descendants", lambda: [12, 13])  # 13 ended in the meantime
    found = peak_host(fake_proc(tmp_path, {"self": STATUS, "12": "VmHWM:\t 300 kB\n"}))
    assert found.bytes == 1000 * 1024
    assert found.note is not None
    assert "1 child processes" in found.note


def test_a_system_without_proc_falls_back_to_ru_maxrss_under_that_name(tmp_path: Path) -> None:
    assert idle_host(tmp_path) == MemoryReading("VmRSS", None, "no /proc on this system")
    found = peak_host(tmp_path)
    assert found.probe == "ru_maxrss"
    assert found.bytes is not None
    assert found.bytes > 1 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_keeps_what_was_touched_and_freed() -> None:
    code = (
        "from sglp_bench.devices.memory import idle_host, peak_host\n"
        "before = idle_host().bytes\n"
        "block = bytearray(b'x') * (64 << 20)\n"
        "del block\n"
        "print(peak_host().bytes - before, idle_host().bytes - before)"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    peak, after = map(int, done.stdout.split())
    assert peak >= 60 << 20  # the kernel counts pages in batches, so RSS and its peak are a little behind
    assert after < 32 << 20


def test_no_device_is_read_on_the_cpu() -> None:
    assert device_readings("cpu", through_torch=True) == {}


def test_torch_is_asked_only_when_a_runner_has_loaded_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_nvml_process_used", lambda index: MemoryReading("nvml", None))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert device_readings("cuda", through_torch=True)["device_allocated_peak"].bytes is None
    assert "torch" not in sys.modules

    cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        max_memory_allocated=lambda index: 100 + index,
        max_memory_reserved=lambda index: 200 + index,
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    found = device_readings("cuda:1", through_torch=True)
    assert found["device_allocated_peak"] == MemoryReading("torch.cuda.max_memory_allocated", 101)
    assert found["device_reserved_peak"].bytes == 201
    # TensorRT keeps its inputs and outputs in tensors, and its weights and workspace elsewhere.
    partly = device_readings("cuda:1", through_torch=False)["device_allocated_peak"]
    assert partly.bytes is None
    assert partly.note == "this runtime does not allocate all of its memory through torch"


def fake_nvml(processes: list[types.SimpleNamespace]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: processes,
    )


@pytest.mark.parametrize(
    ("used", "expected"), [([(True, 40), (False, 7)], 40), ([(True, None)], None), ([(False, 7)], None), ([], None)]
)
def test_nvml_counts_only_our_own_processes(
    monkeypatch: pytest.MonkeyPatch, used: list[tuple[bool, int | None]], expected: int | None
) -> None:
    processes = [types.SimpleNamespace(pid=os.getpid() if ours else 1, usedGpuMemory=size) for ours, size in used]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(processes))
    assert device_readings("cuda", through_torch=True)["device_process_used"].bytes == expected


def test_a_refusal_of_nvml_is_a_note_and_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(nvmlInit=refuse))
    assert device_readings("cuda", through_torch=True)["device_process_used"].note == "NVML refused: Driver Not Loaded"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device_readings("cuda", through_torch=True)["device_process_used"].note == "needs nvidia-ml-py"


def test_a_reading_survives_json() -> None:
    reading = MemoryReading("VmHWM", 3, "note")
    assert MemoryReading.from_json(reading.to_json()) == reading
