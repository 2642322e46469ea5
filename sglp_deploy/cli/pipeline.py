"""The whole line into one folder, resumable: the stages, and what decides each (:mod:`sglp_deploy.cli.engine`).

Nothing here imports torch before a stage needs it.  A run that has nothing to do should cost nothing.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_bench.devices.environment import COMPARABLE_KEYS, collect_environment
from sglp_bench.judge.ceiling import ceilings_of
from sglp_bench.judge.compare import Comparison, compare_results
from sglp_bench.measure.harness import run_arms
from sglp_bench.measure.timeable import reason_not_timed
from sglp_bench.report.run_report import RunReport
from sglp_bench.result import BenchmarkResult
from sglp_bench.workloads.generate import Workload
from sglp_deploy import __version__, _io, registry
from sglp_deploy.artifact import ExportArtifact, producer_versions
from sglp_deploy.cli import ledger, session
from sglp_deploy.cli.config import Export, RunConfig
from sglp_deploy.cli.console import Console
from sglp_deploy.cli.engine import Engine
from sglp_deploy.cli.outcome import Outcome, outcome_of
from sglp_deploy.cli.settings import NO_REPAIR
from sglp_deploy.cli.stages.decide import Deciding
from sglp_deploy.errors import (
    ArtifactError,
    ConfigError,
    ExportError,
    MissingDependencyError,
    UnsupportedModelError,
)
from sglp_deploy.isolation import environments
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.plan import PruningPlan

if TYPE_CHECKING:
    from sglp_deploy.compressor import Compressor

# What one format may fail by without stopping the others; a full disk or a wrong plan concerns all of them.
_FAILS_ALONE = (ExportError, UnsupportedModelError, ArtifactError, ConfigError)

# What every stage computes with; what a format depends on beside it, its exporter declares.
_PACKAGES = ("torch", "transformers", "numpy")

# What each kind of stage reads of the configuration, beside the model itself.
_WEIGHTS = ("dtype", "device")
_VERIFY = (*_WEIGHTS, "threads", "text")
_QUALITY = (
    *_WEIGHTS, "threads", "text", "evaluation_tokens", "evaluation_chunk", "seed",
    "tasks", "tasks_limit", "sample_tokens",
)  # fmt: skip


class Pipeline:
    """One run of every stage into ``config.output``.

    Args:
        config: What to do.
        console: Where to say what is going on.
        command: Recorded in ``run.json`` and the report.
    """

    def __init__(self, config: RunConfig, console: Console, command: str = "") -> None:
        self._workload = Workload.named(config.workload, device=config.device, threads=config.threads)
        session.check_texts(config)
        self._config = config
        self._console = console
        self._command = command
        self._root = Path(config.output)
        self._compressor: Compressor | None = None
        self._plan: PruningPlan | None = None
        self._formats_checked = False
        self._failures: dict[str, str] = {}
        self._formats = {export.name: registry.facts(export.format) for export in self._exports()}
        core = producer_versions(*_PACKAGES) | {"sglp-deploy": __version__}
        more = [name for facts in self._formats.values() for name in facts.packages]
        self._versions = producer_versions(*more) | core
        self._environment = collect_environment(device=config.device, threads=config.threads, packages=more)
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._engine = Engine(
            self._root,
            versions=core,
            describe=self._about,
            prepare=self._check_formats,
            note=console.note,
            # A plan counts by its decision, because its file also holds wall times.
            counted_as=dict.fromkeys(
                ("plan.json", ledger.DECIDED, ledger.REPAIRED), lambda file: PruningPlan.load(file).digest()
            ),
        )

    def run(self) -> Outcome:
        """Run what needs running, in order.

        Raises:
            SGLPError: The first failure; stages finished before it are kept.
        """
        if not (self._root / ledger.RUN_FILE).is_file():
            self._check_formats()  # a name nobody knows is refused before a folder is made
        with self._engine.opened():
            model = ledger.model_digest(self._config.model)
            planned = Deciding(self._config, self._console, self._engine, self._settings, self._loaded).run(model)
            plan = self._plan = PruningPlan.load(self._root / "plan.json")
            made = self._make_artifacts(plan, planned, model)
            verified = self._verify_artifacts(made, model)
            settings = self._settings(_QUALITY)
            judged = self._engine.stage(
                "quality", settings, [planned, model], ["quality.json"], lambda: self._judge(plan)
            )
            self._release_model()
            measured = self._bench_stage(plan, made)
            for stranger, moved in ledger.remove_strangers(self._root, self._engine.outputs()):
                done = "removed" if moved is None else f"changed or damaged, so moved to {moved}:"
                self._console.note(f"{done} {stranger}: an earlier run made it, this one does not")
            self._engine.forget_others("report")
            upstream = [planned, judged, measured, *made.values(), *verified]
            outputs = ["report/report.json", "report/report.html"]
            settings = {"layout": 3, "accept": self._config.limits}
            self._engine.stage("report", settings, upstream, outputs, self._write_report)
            self._engine.save()
            return outcome_of(self._root, plan, self._failures)

    # ------------------------------------------------------------------------------------------------ stages

    def _make_artifacts(self, plan: PruningPlan, planned: str, model: str) -> dict[str, str]:
        """The checkpoint and every format asked for, with its baseline where it will be measured; name to product."""
        # The torch exporter writes the checkpoint and adds a manifest, so it is an artifact like the others.
        made = {"torch": self._export_stage("checkpoint", Export("torch", "torch", {}), plan, [planned, model])}
        for export in self._exports():
            name = export.name
            try:
                if name != "torch":
                    made[name] = self._export_stage(f"export {name}", export, plan, [planned, model])
                if self._not_timed("checkpoint" if name == "torch" else f"export {name}", export) is None:
                    # The baseline keeps every layer, so no plan has a say in it.
                    made[f"{name}-baseline"] = self._export_stage(f"export {name}-baseline", export, None, [model])
            except _FAILS_ALONE as error:
                self._failed(f"export {name}", error)
        return made

    def _not_timed(self, stage: str, export: Export) -> str | None:
        """Why an export is not measured, as its runner says, or None; kept with the stage that made it."""

        def ask() -> str | None:
            reason = reason_not_timed(self._artifact(export.name), self._workload)
            if reason is not None:
                self._console.note(f"{export.name}: not measured; {reason}")
            return reason

        settings = {"workload": self._workload.to_json(), **self._depends_on(export.name)}
        return self._engine.answer(stage, settings, ask)

    def _failed(self, what: str, error: Exception) -> None:
        """One format has failed and the others go on; its stage says why, and so do the report and the exit code."""
        self._failures[what] = str(error)
        self._console.warn(f"{what} failed; {error}")

    def _export_stage(self, stage: str, export: Export, plan: PruningPlan | None, upstream: Sequence[str]) -> str:
        output = stage if stage == "checkpoint" else f"artifacts/{stage.removeprefix('export ')}"
        settings = self._settings(_WEIGHTS) | {
            "exporter": ledger.provider(registry.GROUP, export.format),
            "format": export.format,
            "options": dict(export.options),
            "packages": self._packages_of(export.name),
        }
        if plan is None:
            settings |= self._settings(("seed",))  # recorded in the keep-all plan

        def write() -> None:
            compressor = self._loaded()
            kept = plan or compressor.keep_all()
            if aside := ledger.set_aside(self._root, output):
                self._console.note(f"moved {output} to {aside}: somebody has changed it since it was written")
            compressor.export(kept, export.format, self._root / output, **export.options)

        return self._engine.stage(stage, settings, upstream, [output], write)

    def _verify_artifacts(self, made: Mapping[str, str], model: str) -> list[str]:
        products = []
        made_for = self._config.to
        measured = any(f"{name}-baseline" in made for name in made_for)
        for name, product in made.items():
            if name == "torch" and "torch" not in made_for and not measured:
                continue  # nothing will be timed against it, and it was loaded back bit for bit when it was written

            def verify(name: str = name) -> None:
                text = session.own_text(self._config.text, max_tokens=8_192)
                report = self._loaded().verify(self._artifact(name), text=text, threads=self._config.threads)
                report.save(self._root / "parity" / f"{name}.json")

            stage = f"parity {name}"
            try:
                settings = self._settings(_VERIFY) | self._depends_on(name.removesuffix("-baseline"))
                products.append(self._engine.stage(stage, settings, [product, model], [f"parity/{name}.json"], verify))
            except _FAILS_ALONE as error:
                self._failed(stage, error)
        return products

    def _packages_of(self, name: str) -> dict[str, str]:
        """Versions of what an export's format declares that it depends on."""
        facts = self._formats.get(name)
        return producer_versions(*facts.packages) if facts else {}

    def _depends_on(self, name: str) -> dict[str, Any]:
        """What the running of an export depends on: packages of ours, and the environment it runs in, as it is now."""
        facts = self._formats.get(name)
        used = facts.environment_on(self._config.device) if facts else None
        found = {"environment": environments.state(used)} if used is not None else {}
        return {"packages": self._packages_of(name), **found}

    def _judge(self, plan: PruningPlan) -> None:
        before = self._root / ledger.REPAIRED
        both = self._config.heals and self._config.repair != NO_REPAIR
        repaired = PruningPlan.load(before) if both else None
        quality = session.judged(self._loaded(), self._config, plan, repaired)
        _io.write_json(self._root / "quality.json", quality)

    def _bench_stage(self, plan: PruningPlan, made: Mapping[str, str]) -> str:
        measured = []
        for export in self._exports():
            name = export.name
            if f"{name}-baseline" not in made or not all(self._certified(arm) for arm in (name, f"{name}-baseline")):
                continue
            if failed := [arm for arm in (name, f"{name}-baseline") if not self._parity(arm).passed]:
                self._console.warn(f"{name} is not measured; parity of {failed[0]} failed; see parity/{failed[0]}.json")
            else:
                measured.append(name)
        if not measured:
            return ""
        arms = {arm: made[arm] for name in measured for arm in (f"{name}-baseline", name)}
        names = list(measured)
        if self._certified("torch") and self._parity("torch").passed:
            arms["torch"] = made["torch"]
            names += [f"{name}-against-torch" for name in measured if name != "torch"]
        else:
            self._console.warn("nothing is compared with PyTorch eager; the checkpoint is not certified")
        outputs = [f"bench/{name}/{file}" for name in names for file in ("result.json", "comparison.json")]
        settings = {
            "workload": self._workload.to_json(),
            "measured": measured,
            "runtimes": {name: self._depends_on(name) for name in measured},
            "environment": {key: self._environment.get(key) for key in COMPARABLE_KEYS},
        }
        return self._engine.stage(
            "bench", settings, list(arms.values()), outputs, lambda: self._bench(plan, measured, arms)
        )

    def _bench(self, plan: PruningPlan, measured: Sequence[str], arms: Mapping[str, str]) -> None:
        def progress(done: int, total: int, text: str) -> None:
            del text
            self._console.progress("bench", done, total)

        work = self._root / "bench" / "all"
        # "torch" is PyTorch eager on the same pruned model: what a user has before any export.
        artifacts = {name: self._artifact(name) for name in arms}
        baseline = f"{measured[0]}-baseline"
        result = run_arms(
            artifacts,
            self._workload,
            baseline=baseline,
            out_dir=work,
            progress=progress,
            certificates=[self._parity(name) for name in arms],
        )
        ceilings = ceilings_of(plan, self._workload.batch_size)
        for name in measured:
            comparison = compare_results(result, baseline=f"{name}-baseline", candidate=name).with_ceilings(ceilings)
            self._save_comparison(name, comparison, result)
            if name != "torch" and "torch" in arms:
                versus = compare_results(result, baseline="torch", candidate=name, allow=("precision",))
                self._save_comparison(f"{name}-against-torch", versus, result)
        shutil.rmtree(work, ignore_errors=True)

    def _save_comparison(self, name: str, comparison: Comparison, result: BenchmarkResult) -> None:
        folder = self._root / "bench" / name
        comparison.save(folder / "comparison.json")
        result.save(folder / "result.json")

    def _write_report(self) -> None:
        RunReport.from_run_folder(self._root).save(self._root / "report")

    def _check_formats(self) -> None:
        """Refuse a format nobody knows, and a run none of whose formats can be written, before any work.

        Asked only when there is work to do, because exporters load torch.
        """
        if self._formats_checked:
            return
        missing = []
        exports = self._exports()
        for export in exports:
            try:
                registry.exporter(export.format)
            except MissingDependencyError as error:
                missing.append(error)
        if missing and len(missing) == len(exports):
            raise missing[0]
        self._formats_checked = True

    def _about(self) -> dict[str, Any]:
        """What ``run.json`` says of the run as a whole."""
        # Path.stem would cut "Qwen2.5-0.5B" at its first dot from the right.
        title = Path(self._config.model).name.removesuffix(".gguf") or self._config.model
        if self._plan is not None:
            title = f"{title}: {self._plan.n_layers} to {len(self._plan.keep)} layers"
        return {
            "title": title,
            "created": self._created,
            "command": self._command,
            "seed": self._config.seed,
            "accept": self._config.limits,
            "versions": self._versions,
            "machine": self._environment,
            "checkpoint": _parameter_counts(self._plan) if self._plan else None,
        }

    def _settings(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: ledger.counted(name, getattr(self._config, name)) for name in names}

    def _exports(self) -> list[Export]:
        # PyTorch last: the first measured format is the one whose baseline is repeated as the A/A control.
        return sorted(self._config.exports(), key=lambda export: export.name == "torch")

    def _loaded(self) -> Compressor:
        if self._compressor is None:
            from sglp_deploy.models.samples import table_of_positions  # it needs torch, which a finished run does not

            self._compressor = session.compressor(self._config, self._console)
            self._workload.require_positions(table_of_positions(self._compressor.model))
            for export in self._exports():
                try:
                    check = getattr(registry.exporter(export.format), "check_precision", None)
                except MissingDependencyError:
                    continue  # it fails alone, later, and the report says why
                # Asked of the weights that were loaded, before minutes go into a plan for a format that refuses them.
                if check is not None:
                    check(self._compressor.precision)
        return self._compressor

    def _release_model(self) -> None:
        """Give the model's memory back, the accelerator's too: the benchmark's workers need it more."""
        if self._compressor is None:
            return
        self._compressor = None
        gc.collect()
        if self._config.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def _artifact(self, name: str) -> ExportArtifact:
        folder = self._root / ("checkpoint" if name == "torch" else f"artifacts/{name}")
        return ExportArtifact.load(folder, check_files=False)

    def _certified(self, name: str) -> bool:
        """Whether this run has judged that artifact, well or badly; not so when a stage of it failed."""
        return self._engine.done(f"parity {name}")

    def _parity(self, name: str) -> ParityReport:
        return ParityReport.load(self._root / "parity" / f"{name}.json")


def _parameter_counts(plan: PruningPlan) -> dict[str, int] | None:
    layers, dense = plan.model.get("layer_parameters"), plan.model.get("parameters")
    if not layers or dense is None:
        return None
    return {"parameters": dense - sum(layers[index] for index in plan.drop), "dense_parameters": dense}
