import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench_fakes import VOCABULARY, FakeClock, FakeRunner, fake_artifact
from sglp_bench.workloads.generate import Workload, time_block
from sglp_bench.workloads.generate_samples import BlockSamples
from sglp_bench.workloads.timing import is_flat
from sglp_deploy.errors import BenchmarkError

WORK = Workload("mine", batch_size=2, prompt_tokens=3, decode_tokens=4, prefill_repeats=3, decode_repeats=2)


def block(tmp_path: Path, work: Workload = WORK, runner: type[FakeRunner] = FakeRunner, **details: Any) -> BlockSamples:
    clock = FakeClock()
    made = runner(fake_artifact(tmp_path / "artifact", **details), clock)
    return time_block(made, work.input_ids(VOCABULARY), work, clock=clock)


def test_flatness_compares_the_medians_of_both_halves_of_the_window() -> None:
    assert not is_flat([1.0, 1.0, 1.0])
    assert is_flat([9.0, 1.0, 1.0, 1.04, 1.04])
    assert not is_flat([1.0, 1.0, 1.06, 1.06])
    assert not is_flat([1.0, 1.0, 0.9, 0.9])


def test_samples_are_the_time_of_each_prefill_and_of_each_decode_step(tmp_path: Path) -> None:
    samples = block(tmp_path, prefill_s=0.25, decode_s=0.5)
    assert samples.prefill_s == pytest.approx([0.25] * 3)
    assert np.asarray(samples.decode_s) == pytest.approx(np.full((2, 4), 0.5))


def test_a_steady_runner_settles_at_the_first_full_window_and_its_warm_up_is_kept_apart(tmp_path: Path) -> None:
    samples = block(tmp_path)
    assert samples.warm_up.settled
    assert len(samples.warm_up.prefill_s) == len(samples.warm_up.decode_s) == 4
    assert len(samples.prefill_s) == 3


class SlowingRunner(FakeRunner):
    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.factor *= 1.05
        return super().decode(token_ids)


def test_a_runner_that_never_becomes_flat_stops_at_the_cap_and_says_so(tmp_path: Path) -> None:
    samples = block(tmp_path, runner=SlowingRunner)
    assert not samples.warm_up.settled
    assert len(samples.warm_up.prefill_s) == WORK.warmup_max


def test_the_clock_is_read_only_after_a_synchronize(tmp_path: Path) -> None:
    runner = FakeRunner(fake_artifact(tmp_path / "artifact"), FakeClock())
    reads = []

    def clock() -> float:
        reads.append(runner.calls[-1])
        return runner.clock.now_s

    time_block(runner, WORK.input_ids(VOCABULARY), WORK, clock=clock)
    assert set(reads) == {"synchronize"}
    # One start and one end for each prefill and each step, the four warm-up iterations included.
    assert len(reads) == 2 * (4 * (1 + 4) + 3 + 2 * 4)


def test_each_decode_repeat_starts_from_a_fresh_prefill(tmp_path: Path) -> None:
    runner = FakeRunner(fake_artifact(tmp_path / "artifact"), FakeClock())
    time_block(runner, WORK.input_ids(VOCABULARY), WORK, clock=runner.clock)
    work = [call for call in runner.calls if call in ("prefill", "decode")]
    assert work[-10:] == ["prefill", *["decode"] * 4] * 2


def test_the_garbage_collector_is_off_inside_the_block_and_on_again_after_it(tmp_path: Path) -> None:
    states = []

    class Watching(FakeRunner):
        def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
            states.append(gc.isenabled())
            return super().decode(token_ids)

    block(tmp_path, runner=Watching)
    assert not any(states)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("nan", r"prefill gave logits that are not finite; .*; run the parity check"),
        ("wrong batch", r"prefill gave logits of shape \(3, 11\) for a batch of 2; .*check the exporter's runner"),
    ],
)
def test_a_broken_runner_is_refused_before_it_is_timed(tmp_path: Path, behaviour: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        block(tmp_path, behaviour=behaviour)


def test_samples_survive_json(tmp_path: Path) -> None:
    samples = block(tmp_path)
    assert BlockSamples.from_json(samples.to_json()) == samples
