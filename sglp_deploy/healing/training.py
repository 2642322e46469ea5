"""The loop: rows of the mix through teacher and student, a step, now and then a look at the held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import nn

from sglp_deploy.errors import CalibrationError
from sglp_deploy.healing.losses import Speaker, Weighting, distilled, nats
from sglp_deploy.healing.parallel import Team
from sglp_deploy.healing.state import Keeper, Standing
from sglp_deploy.healing.teaching import Taught

if TYPE_CHECKING:
    from sglp_deploy.healing.options import HealOptions
    from sglp_deploy.healing.texts.corpus import Mix, Rows

Progress = Callable[[str, int, int], None]

_BETAS: Final = (0.9, 0.95)
_LARGEST_GRADIENT: Final = 1.0  # its norm, over all parameters; larger ones are cut to it
_WARM_STEPS: Final = 10


@dataclass
class Training:
    """One student, one teacher, one mix.

    Attributes:
        student: Trained.
        trained: Its parameters that are.
        teacher: Is not.
        mix: What is read.
        options: How.
        keeper: Writes where the training stands, and knows where an earlier one stood.
        team: The processes that train together.
        progress: Called with (stage, done, in all).
        clock: Seconds.
    """

    student: Speaker
    trained: Mapping[str, nn.Parameter]
    teacher: Speaker
    mix: Mix
    options: HealOptions
    keeper: Keeper
    team: Team = field(default_factory=Team)
    progress: Progress | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        options = self.options
        self.rate = options.rate(self.student.width)
        self._decay = [one for one in self.trained.values() if one.ndim > 1]
        self._plain = [one for one in self.trained.values() if one.ndim <= 1]
        groups = [{"params": self._decay, "weight_decay": options.weight_decay}]
        groups += [{"params": self._plain, "weight_decay": 0.0}] if self._plain else []
        self._optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=_BETAS, fused=True)
        self._how = Weighting(options.ce, options.temperature)
        self._rows = options.batch_size * options.accumulation * self.team.size
        # Each process of a team has rows of its own, and no place of its own to keep them.
        place = self.keeper.beside("taught") if self.team.size == 1 else None
        self._taught = Taught(self.teacher, self.mix, options, place)
        self._standing = Standing()
        self._best: dict[str, torch.Tensor] = {}

    @property
    def tokens_per_step(self) -> int:
        """Over all processes."""
        return self._rows * self.mix.sequence_length

    def run(self) -> Standing:
        """Train to the end of the budget; the student then has the state with the lowest held-out loss.

        Raises:
            CalibrationError: If the loss is no longer finite.
            StorageError: If the state cannot be kept.
        """
        self._resume()
        standing, began = self._standing, self.clock() - self._standing.elapsed_s
        draws = self.mix.drawn(standing.step * self._rows)
        while (done := self._done(standing)) < 1:
            self._step(list(islice(draws, self._rows)), self._rate(standing.step, done))
            standing.step += 1
            (standing.elapsed_s,) = self.team.agree([self.clock() - began])
            self._look(done, self._done(standing))
            (standing.elapsed_s,) = self.team.agree([self.clock() - began])
            self._report(standing)
            if self.team.leads and self.keeper.due:
                self.keeper.write(standing, dict(self._state()))
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self._best.get(name, parameter))
        self._taught.clear()
        return standing

    # ---------------------------------------------------------------------------------------------------- a step

    def _done(self, standing: Standing) -> float:
        """How much of the budget is used up: of tokens or of time, whichever is further."""
        options, parts = self.options, [0.0]
        if options.tokens is not None:
            parts.append(standing.step / max(1, math.ceil(options.tokens / self.tokens_per_step)))
        if options.minutes is not None:
            parts.append(standing.elapsed_s / (60 * options.minutes))
        return max(parts)

    def _rate(self, step: int, done: float) -> float:
        """A short warm-up, then a half cosine to zero."""
        return self.rate * min(1.0, (step + 1) / _WARM_STEPS) * 0.5 * (1 + math.cos(math.pi * done))

    def _step(self, draws: list[tuple[int, int]], rate: float) -> None:
        options, length = self.options, self.mix.sequence_length
        predictions = self._rows * (length - 1)
        mine = draws[self.team.rank :: self.team.size]
        total = 0.0
        for start in range(0, len(mine), options.batch_size):
            batch = mine[start : start + options.batch_size]
            rows = np.stack([self.mix.shares[share].rows[row] for share, row in batch])
            ids = torch.from_numpy(rows).to(self.student.device)
            taught = self._taught.states(batch, ids)
            with torch.enable_grad():
                loss = distilled(self.student, self.student.states(ids), self.teacher, taught, ids, self._how)
                (loss / predictions).backward()  # type: ignore[no-untyped-call]  # torch types backward only partly
            total += float(loss.detach())
        if self.team.size > 1:
            self.team.add_up([_gradient(one) for one in self.trained.values()])
        norm = nn.utils.clip_grad_norm_(self.trained.values(), _LARGEST_GRADIENT)
        if not math.isfinite(total) or not bool(norm.isfinite()):
            raise CalibrationError(
                f"healing diverged at step {self._standing.step + 1}; the loss or its gradient is not finite; give a "
                f"smaller learning_rate than {self.rate:g}"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _look(self, before: float, now: float) -> None:
        """Take the held-out loss where a part of the budget is used up, and keep the best state."""
        count = self.options.evaluations
        if int(before * count) == int(min(now, 1.0) * count):
            return
        standing = self._standing
        loss = self.held_out_loss()
        standing.evaluations.append((min(now, 1.0), loss))
        if loss < standing.best:
            standing.best, standing.best_step = loss, standing.step
            self._best = {name: one.detach().clone() for name, one in self.trained.items()}

    def held_out_loss(self) -> float:
        """Nats per token of the student on the held-out rows of all shares."""
        return held_out_loss(self.student, self.mix.held_out, self.options.batch_size, self.team)

    def _report(self, standing: Standing) -> None:
        if self.progress is not None and self.team.leads:
            self.progress("healing", min(1000, int(1000 * self._done(standing))), 1000)

    # --------------------------------------------------------------------------------------------- what is kept

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything a later process needs beside the numbers; what is drawn at random follows from the step."""
        for name, parameter in self.trained.items():
            yield f"now/{name}", parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self._optimizer.state[parameter]:
                    yield f"{moment}/{name}", self._optimizer.state[parameter][moment]
            if "step" in self._optimizer.state[parameter]:  # an expert that saw no token has made fewer
                yield f"step/{name}", self._optimizer.state[parameter]["step"]
            if self._best and self._standing.best_step != self._standing.step:
                yield f"best/{name}", self._best[name]

    def _resume(self) -> None:
        found = self.keeper.read() if self.team.leads else None
        (resumed,) = self.team.agree([float(found is not None)])
        if not resumed:
            return
        if found is not None:
            self._standing = found[0]
        self._standing = _told(self._standing, self.team)
        tensors = {} if found is None else found[1]
        (has_best,) = self.team.agree([float(any(name.startswith("best/") for name in tensors))])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors.get(f"now/{name}", parameter))
                self.team.share([parameter.detach()])
                (trained,) = self.team.agree([float(f"exp_avg/{name}" in tensors)])
                if trained:
                    state = self._optimizer.state[parameter]
                    shapes = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
                    for part, like in shapes.items():
                        given = tensors.get(f"{part}/{name}", like)
                        state[part] = given.detach().to(parameter.device, copy=True)
                        self.team.share([state[part]])
                if has_best or self._standing.best_step == self._standing.step:
                    best = tensors.get(f"best/{name}", parameter)
                    self._best[name] = best.detach().to(parameter.device, copy=True)
                    self.team.share([self._best[name]])


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Zeros where this process had none and another may have one (an expert that saw no token)."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _told(standing: Standing, team: Team) -> Standing:
    """The first process's numbers, in every process; its list of evaluations is its own."""
    step, elapsed, best, best_step = team.agree([standing.step, standing.elapsed_s, standing.best, standing.best_step])
    return Standing(int(step), elapsed, standing.evaluations, best, int(best_step))


def held_out_loss(speaker: Speaker, rows: Rows, batch_size: int, team: Team | None = None) -> float:
    """Nats per predicted token; infinity where it is not finite.  The processes of a team take every so many-th row."""
    rank, size = (0, 1) if team is None else (team.rank, team.size)
    mine = rows[rank::size]
    total = torch.tensor([float(nats(speaker, mine, batch_size=batch_size).sum())], dtype=torch.float64)
    total = total.to(speaker.device)
    if team is not None:
        team.add_up([total])
    loss = float(total) / (rows.shape[0] * (rows.shape[1] - 1))
    return loss if math.isfinite(loss) else math.inf
