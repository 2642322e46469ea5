import numpy as np
import pytest

from sglp_bench.workloads.generate import Workload
from sglp_deploy.errors import ConfigError


def test_every_fault_of_a_workload_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Workload("mine", prompt_tokens=0, decode_tokens=-1, threads=0, seed=-3, device="tpu")
    assert len(caught.value.faults) == 5
    assert "prompt_tokens=0 is not a positive whole number" in str(caught.value)
    assert "device='tpu' is unknown" in str(caught.value)


@pytest.mark.parametrize("value", [2.0, True, "3"])
def test_a_count_must_be_a_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match=r"cycles=.* is not a positive whole number; .*; pass 1 or more"):
        Workload.from_json({"name": "mine", "cycles": value})


def test_named_workloads_take_changes() -> None:
    changed = Workload.named("smoke", threads=1, cycles=7)
    assert (changed.name, changed.threads, changed.cycles) == ("smoke", 1, 7)
    assert changed.prompt_tokens == Workload.named("smoke").prompt_tokens


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no workload is named 'decode-smal'; .*did you mean 'decode-small'\?"):
        Workload.named("decode-smal")


def test_unknown_fields_and_a_missing_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="workload field 'batch' is unknown"):
        Workload.from_json({"name": "mine", "batch": 3})
    with pytest.raises(ConfigError, match="has no name"):
        Workload.from_json({"cycles": 3})


def test_json_round_trip_keeps_the_digest_and_every_field_moves_it() -> None:
    work = Workload.named("decode-small", device="cuda:1")
    assert Workload.from_json(work.to_json()) == work
    assert Workload.from_json(work.to_json()).digest == work.digest
    assert Workload.named("decode-small", device="cuda:1", seed=1).digest != work.digest


def test_token_ids_are_equal_for_equal_workloads_and_inside_the_vocabulary() -> None:
    work = Workload("mine", batch_size=2, prompt_tokens=300, decode_tokens=5)
    first, second = work.input_ids(7), work.input_ids(7)
    assert first.prompt.shape == (2, 300)
    assert first.continuation.shape == (5, 2)
    np.testing.assert_array_equal(first.prompt, second.prompt)
    np.testing.assert_array_equal(first.continuation, second.continuation)
    assert set(np.unique(first.prompt)) == set(range(7))
    other = Workload("mine", batch_size=2, prompt_tokens=300, decode_tokens=5, seed=1).input_ids(7)
    assert (other.prompt != first.prompt).any()
