"""The budget, the schedule, the best state, and a training that is broken off and ends where it would have ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from sglp_deploy.errors import CalibrationError
from sglp_deploy.healing import state
from sglp_deploy.healing.losses import Speaker, Weighting, distilled
from sglp_deploy.healing.options import HealOptions
from sglp_deploy.healing.state import Keeper, Standing
from sglp_deploy.healing.teaching import Taught
from sglp_deploy.healing.texts.corpus import Mix, Share
from sglp_deploy.healing.training import Training, held_out_loss
from sglp_deploy.tasks import task

TEXT = np.random.default_rng(0).integers(0, 250, size=(4, 17, 24))
MIX = Mix(tuple(Share(name, rows[:14], rows[14:]) for name, rows in zip("ab", TEXT[:2], strict=True)), seed=1)
OPTIONS = HealOptions(tokens=24 * 4 * 10, batch_size=2, accumulation=2, learning_rate=3e-3)  # ten steps of four rows


class Broken(Exception):
    """Stands for the end of the process."""


def made(
    options: HealOptions = OPTIONS, folder: Path | None = None, mix: Mix = MIX, clock: Callable[[], float] | None = None
) -> Training:
    student, teacher = tiny.model("llama", seed=1), tiny.model("llama", seed=2)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".layers." in name)
    trained = {name: one for name, one in student.named_parameters() if one.requires_grad}
    speakers = (Speaker(each, torch.float32) for each in (student, teacher))
    more: dict[str, Any] = {} if clock is None else {"clock": clock}
    return Training(next(speakers), trained, next(speakers), mix, options, Keeper(folder, "0abcdef9" * 8), **more)


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in training.trained.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_ten_steps_are_ten_steps_of_adam_on_the_mean_loss_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "held_out_loss", lambda own: 10 - own._standing.step)  # the last state is the best
    own = made()
    oracle = made()
    optimizer = torch.optim.Adam(oracle.trained.values(), betas=(0.9, 0.95))
    draws = MIX.drawn()
    for step in range(10):
        rows = np.stack([MIX.shares[share].rows[row] for share, row in (next(draws) for _ in range(4))])
        ids = torch.from_numpy(rows)
        q = oracle.student.module(input_ids=ids).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            p = oracle.teacher.module(input_ids=ids).logits[:, :-1].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        cross = torch.nn.functional.nll_loss(q.reshape(-1, q.shape[-1]), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        (0.7 * kl + 0.3 * cross).backward()
        norm = torch.sqrt(sum(one.grad.pow(2).sum() for one in oracle.trained.values() if one.grad is not None))
        for one in oracle.trained.values():
            assert one.grad is not None
            one.grad *= min(1.0, 1 / float(norm))
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / 10)) / 2
        optimizer.step()
    standing = own.run()
    assert standing.step == standing.best_step == 10
    for name, parameter in oracle.trained.items():
        torch.testing.assert_close(own.trained[name], parameter, rtol=1e-3, atol=2e-4)


def test_the_held_out_loss_is_the_task_s() -> None:
    own = made()
    mean, _ = task("language").loss(own.student.module, (MIX.held_out, np.ones_like(MIX.held_out)))
    assert own.held_out_loss() == pytest.approx(float(mean.detach()), rel=1e-5)


def test_it_comes_closer_to_its_teacher_on_rows_it_is_not_trained_on() -> None:
    ids = torch.from_numpy(MIX.held_out)

    def kl(own: Training) -> float:
        with torch.no_grad():
            taught, states = own.teacher.states(ids), own.student.states(ids)
            return float(distilled(own.student, states, own.teacher, taught, ids, Weighting(0.0)))

    own = made(HealOptions(tokens=24 * 4 * 60, ce=0.0, learning_rate=3e-3))
    before = kl(own)
    own.run()
    assert kl(own) < 0.9 * before


def test_the_best_state_is_kept_when_the_held_out_loss_rises_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = made(), dict[int, dict[str, torch.Tensor]]()
    planted = {3: 5.0, 5: 4.0, 8: 4.5, 10: 6.0}  # a look after each quarter: 2.5, 5, 7.5 and 10 steps

    def loss(training: Training) -> float:
        seen[training._standing.step] = weights(training)
        return planted[training._standing.step]

    monkeypatch.setattr(Training, "held_out_loss", loss)
    standing = own.run()
    assert (standing.best, standing.best_step, standing.step) == (4.0, 5, 10)
    assert standing.evaluations == [(0.3, 5.0), (0.5, 4.0), (0.8, 4.5), (1.0, 6.0)]
    assert same(weights(own), seen[5])
    assert not same(seen[10], seen[5])


@pytest.fixture(scope="module")
def unbroken() -> tuple[Training, Standing]:
    own = made()
    return own, own.run()


def test_broken_off_while_rows_come_again_it_ends_at_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = HealOptions(tokens=24 * 3 * 20, batch_size=3, learning_rate=3e-3)  # two passes, in batches of odd size
    whole = made(options, tmp_path / "whole")
    whole.run()
    real, count = Taught._keep, [0]

    def keep(taught: Taught, *given: Any) -> None:
        count[0] += 1
        if count[0] == 6:
            raise Broken
        real(taught, *given)

    monkeypatch.setattr(Taught, "_keep", keep)
    for number in range(4):
        monkeypatch.setattr(Keeper, "due", number % 2 == 0)  # so that some of what is kept is newer than the state
        count[0] = 0
        resumed = made(options, tmp_path / "broken")
        try:
            resumed.run()
            break
        except Broken:
            continue
    else:
        monkeypatch.setattr(Taught, "_keep", real)
        resumed = made(options, tmp_path / "broken")
        resumed.run()
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("after", [1, 4, 6, 9])
def test_broken_off_after_any_step_it_ends_at_the_same_bits(
    after: int, unbroken: tuple[Training, Standing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, end = unbroken
    monkeypatch.setattr(Keeper, "due", True)
    real = Keeper.write

    def write(keeper: Keeper, standing: Standing, tensors: Any) -> None:
        real(keeper, standing, tensors)
        if standing.step == after:
            raise Broken

    monkeypatch.setattr(Keeper, "write", write)
    with pytest.raises(Broken):
        made(folder=tmp_path).run()
    monkeypatch.setattr(Keeper, "write", real)
    steps: list[int] = []
    step = Training._step
    monkeypatch.setattr(Training, "_step", lambda own, *given: (steps.append(1), step(own, *given))[1])
    resumed = made(folder=tmp_path)
    found = resumed.run()
    assert len(steps) == 10 - after
    assert same(weights(whole), weights(resumed))
    assert (found.step, found.best, found.evaluations) == (end.step, end.best, end.evaluations)


def test_the_best_state_survives_a_break_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeper, "due", True)
    planted = {3: 4.0, 5: 5.0, 8: 5.0, 10: 6.0}
    monkeypatch.setattr(Training, "held_out_loss", lambda own: planted[own._standing.step])
    whole = made()
    whole.run()
    real = Training._step

    def step(own: Training, *given: Any) -> None:
        if own._standing.step == 7:
            raise Broken
        real(own, *given)

    monkeypatch.setattr(Training, "_step", step)
    with pytest.raises(Broken):
        made(folder=tmp_path).run()
    monkeypatch.setattr(Training, "_step", real)
    resumed = made(folder=tmp_path)
    assert resumed.run().best_step == 3
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("spoiled", [b"", b"damaged"])
def test_a_state_that_is_damaged_or_of_another_training_is_not_used(spoiled: bytes, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, "a" * 64)
    keeper.write(Standing(step=3), {"now/x": torch.zeros(2)})
    found = keeper.read()
    assert found is not None
    assert found[0].step == 3
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    file.write_bytes(spoiled)
    assert keeper.read() is None
    file.write_bytes(kept)
    (tmp_path / "mine.txt").write_text("somebody's")
    (tmp_path / f".{'a' * 32}.safetensors.x.tmp").write_bytes(b"half")
    assert Keeper(tmp_path, "b" * 64).read() is None
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "mine.txt").unlink()
    file.write_bytes(kept)
    keeper.clear()
    assert not tmp_path.exists()


class Clock:
    """A second passes with each step; asked more often, it stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, real = 0.0, Training._step

        def step(own: Training, *given: Any) -> None:
            self.now += 1
            real(own, *given)

        monkeypatch.setattr(Training, "_step", step)

    def __call__(self) -> float:
        return self.now


def test_time_bounds_training_over_all_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = HealOptions(minutes=0.1, batch_size=1)  # six seconds, six steps
    assert made(options, clock=Clock(monkeypatch)).run().step == 6
    monkeypatch.setattr(Keeper, "due", True)
    real = Keeper.write

    def write(keeper: Keeper, standing: Standing, tensors: Any) -> None:
        real(keeper, standing, tensors)
        if standing.step == 4:
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "write", write)
        with pytest.raises(Broken):
            made(options, tmp_path, clock=Clock(patch)).run()
    standing = made(options, tmp_path, clock=Clock(monkeypatch)).run()
    assert standing.step == 6
    assert standing.elapsed_s == pytest.approx(6)


def test_the_schedule_follows_whichever_budget_is_further(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Training._step
    monkeypatch.setattr(Training, "_step", lambda own, draws, rate: (rates.append(rate), step(own, draws, rate))[1])
    options = HealOptions(minutes=0.1, tokens=24 * 100, batch_size=1, learning_rate=1e-3)
    made(options, clock=Clock(monkeypatch)).run()
    cosine = [0.5 * (1 + math.cos(math.pi * number / 6)) for number in range(6)]
    assert rates == pytest.approx([1e-3 * each * (number + 1) / 10 for number, each in enumerate(cosine)])


def test_a_training_that_diverges_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    own = made()
    with torch.no_grad():
        next(iter(own.trained.values())).fill_(float("nan"))
    words = (
        r"healing diverged at step 1; the loss or its gradient is not finite; give a smaller learning_rate than 0\.003"
    )
    with pytest.raises(CalibrationError, match=words):
        own.run()


def test_a_loss_beyond_all_numbers_is_infinite() -> None:
    own = made()
    with torch.no_grad():
        next(iter(own.trained.values())).fill_(float("nan"))
    assert held_out_loss(own.student, MIX.held_out, 2) == math.inf


def test_each_write_waits_until_it_is_worth_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 59.0, 61.0, 100.0, 110.0, 309.0, 311.0])
    monkeypatch.setattr(state.time, "monotonic", lambda: next(times))
    keeper = Keeper(tmp_path, "a" * 64)
    assert (keeper.due, keeper.due) == (False, True)
    keeper.write(Standing(), {"now/x": torch.zeros(2)})  # takes ten seconds, so the next may come 200 later
    assert (keeper.due, keeper.due) == (False, True)
