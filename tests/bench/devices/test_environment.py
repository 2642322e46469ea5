import json
import sys
import types

import pytest

from sglp_bench.devices.environment import (
    COMPARABLE_KEYS,
    THREAD_VARIABLES,
    block_conditions,
    collect_environment,
    differing_keys,
    thread_variables,
)


def test_the_environment_is_json_and_holds_every_key_results_are_compared_by() -> None:
    found = collect_environment()
    assert json.loads(json.dumps(found)) == found
    assert set(COMPARABLE_KEYS) <= set(found)
    assert found["cpus_usable"] >= 1
    assert found["gpus"] is None
    assert found["energy_j"] is None


def test_versions_of_what_the_measured_formats_depend_on_are_recorded() -> None:
    usual = collect_environment()["packages"]
    assert usual.keys() >= {"numpy", "torch", "transformers"}
    assert "pytest" not in usual
    more = collect_environment(packages=["pytest", "no-such-runtime"])
    assert more["packages"] == usual | {"pytest": pytest.__version__, "no-such-runtime": "not installed"}
    # Two runs of different formats compare by what both depend on.
    assert differing_keys(collect_environment(), more) == []
    assert differing_keys({**more, "packages": {**more["packages"], "pytest": "1.0"}}, more) == ["packages"]


def test_thread_variables_are_those_the_blocks_will_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert collect_environment()["thread_variables"] == {"OMP_NUM_THREADS": "7"}
    assert collect_environment(threads=2)["thread_variables"] == dict.fromkeys(THREAD_VARIABLES, "2")
    assert thread_variables(None) == {}


def test_facts_that_vary_within_a_run_do_not_make_two_environments_differ() -> None:
    here = collect_environment()
    assert differing_keys(here, {**here, "collected_at": "later", "os_release": "another"}) == []
    assert differing_keys(here, {**here, "python": "CPython 2.7", "machine": "vax"}) == ["machine", "python"]


def test_conditions_hold_the_load_and_ask_the_graphics_card_only_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gpu" not in block_conditions()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = block_conditions("cuda")
    assert found["gpu"] is None
    assert set(found) == {"at", "load_average_1min", "cpu_mhz", "gpu"}


def test_graphics_cards_are_named_when_nvml_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "A card",
        nvmlSystemGetDriverVersion=lambda: "1.2",
        NVML_CLOCK_SM=0,
        NVML_CLOCK_MEM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 + kind,
        nvmlDeviceGetTemperature=lambda handle, kind: 50,
        nvmlDeviceGetPowerUsage=lambda handle: 70_500,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 4,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = collect_environment(device="cuda:0")
    assert (found["gpus"], found["gpu_driver"]) == (["A card"], "1.2")
    assert block_conditions("cuda:0")["gpu"] == {
        "sm_clock_mhz": 1000,
        "memory_clock_mhz": 1001,
        "temperature_c": 50,
        "power_w": 70.5,
        "throttle_reasons": 4,
    }
