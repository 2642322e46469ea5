"""The stages that lead to ``plan.json``: the plan, and what changes weights to make up for the removed layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglp_deploy.artifact import producer_versions
from sglp_deploy.cli import ledger, session
from sglp_deploy.cli.config import RunConfig
from sglp_deploy.cli.console import Console
from sglp_deploy.cli.engine import Engine
from sglp_deploy.cli.settings import NO_REPAIR
from sglp_deploy.plan import PruningPlan
from sglp_deploy.planners.registry import PLANNER_GROUP

if TYPE_CHECKING:
    from sglp_deploy.compressor import Compressor

# What each stage reads of the configuration, beside the model itself.
_WEIGHTS: Final = ("dtype", "device")
_PLAN: Final = (
    *_WEIGHTS, "drop", "keep", "max_parameters", "method", "plan_options",
    "calibration", "calibration_tokens", "sequence_length", "batch_size", "rows", "skip_positions",
    "preserve_pattern", "seed",
)  # fmt: skip
_REPAIR: Final = (
    *_WEIGHTS, "repair", "repair_tokens", "repair_options", "calibration", "sequence_length", "batch_size", "seed",
)  # fmt: skip
_HEAL: Final = (*_WEIGHTS, "heal_text", "calibration")  # without a text of its own it takes the plan's


@dataclass(frozen=True)
class Deciding:
    """Plan, repair what was planned, heal what was repaired; the last of them that is asked for writes ``plan.json``.

    Attributes:
        config: What to do.
        console: Where to say what is going on.
        engine: Runs the stages.
        settings: Values of settings by name, as stages depend on them.
        loaded: The model, loaded when it is first asked for.
    """

    config: RunConfig
    console: Console
    engine: Engine
    settings: Callable[[Sequence[str]], dict[str, Any]]
    loaded: Callable[[], Compressor]

    def run(self, model: str) -> str:
        """The product of the stage that wrote ``plan.json``; ``model`` is the digest of the model's files."""
        repairing, healing = self.config.repair != NO_REPAIR, self.config.heals
        file = ledger.DECIDED if repairing or healing else "plan.json"
        settings = self.settings(_PLAN) | {"planner": ledger.provider(PLANNER_GROUP, self.config.method)}
        made = self.engine.stage("plan", settings, [model], [file], lambda: self._make_plan(file))
        if repairing:
            out = ledger.REPAIRED if healing else "plan.json"
            settings = self.settings(_REPAIR)
            made = self.engine.stage("repair", settings, [made, model], [out], lambda: self._make_repair(out))
        if healing:
            before = ledger.REPAIRED if repairing else ledger.DECIDED
            settings = self.settings(_HEAL) | {"healing": asdict(self.config.healing())}
            # The first brings a text of the mix, the second is how LoRA is done.
            settings |= {"packages": producer_versions("gensim", "peft")}
            made = self.engine.stage("heal", settings, [made, model], ["plan.json"], lambda: self._make_healed(before))
        return made

    @property
    def _root(self) -> Path:
        return self.engine.root

    def _make_plan(self, file: str) -> list[str]:
        plan = session.make_plan(self.loaded(), self.config)
        self.console.note(f"plan: remove layers {', '.join(map(str, plan.drop)) or 'none'}")
        return self._save(plan, file)

    def _make_repair(self, out: str) -> list[str]:
        plan = PruningPlan.load(self._root / ledger.DECIDED)
        if plan.drop:
            plan = session.repaired_plan(self.loaded(), self.config, plan, self.console)
        else:
            self.console.note("repair: the plan removes no layer, so there is nothing to repair")
        return self._save(plan, out)

    def _make_healed(self, before: str) -> list[str]:
        plan = PruningPlan.load(self._root / before)
        if plan.drop:
            plan = session.healed_plan(self.loaded(), self.config, plan, self.console, self._root / ledger.HEALING)
        else:
            self.console.note("heal: the plan removes no layer, so there is nothing to heal")
        return self._save(plan, "plan.json")

    def _save(self, plan: PruningPlan, file: str) -> list[str]:
        """Write a plan and the weights it changes; returns the path of these, where there are any."""
        plan.save(self._root / file)
        overlay = plan.save_overlay((self._root / file).parent)
        return [] if overlay is None else [overlay.relative_to(self._root).as_posix()]
