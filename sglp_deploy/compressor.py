"""The one object a user holds: a model, its calibration data, and the stages in order.  Each method calls one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy import materialize as materializing
from sglp_deploy import registry
from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.lazy import ModelEvidence
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.healing.healed import healed
from sglp_deploy.healing.options import HealOptions, read_heal_options
from sglp_deploy.healing.texts.corpus import mix_of
from sglp_deploy.healing.texts.parts import default_parts
from sglp_deploy.models import LayerStack, LoadedModel, adapter_for, layer_stack, load_model, parameter_sizes, precision
from sglp_deploy.models.patterns import check_layer_types, pattern_groups
from sglp_deploy.models.samples import table_of_positions
from sglp_deploy.overlay import repairs_of
from sglp_deploy.parity.verify import verify_with_plan
from sglp_deploy.plan import PruningPlan, by_hand_plan, keep_all_plan, make_plan
from sglp_deploy.planners.budget import Budget, check_parameter_budget
from sglp_deploy.planners.registry import read_options
from sglp_deploy.repairs.judged import repaired
from sglp_deploy.tasks import task_of
from sglp_deploy.tasks.both import judged, sampled

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.evidence.statistics import LayerStats
    from sglp_deploy.evidence.text import TokenBatches
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.certificate import ParityReport
    from sglp_deploy.tasks.asked import JudgedTask
    from sglp_deploy.tasks.base import Task

Progress = Callable[[str, int, int], None]


class Compressor:
    """Plans, materializes, exports and verifies shallower versions of one model, which it never alters.

    Args:
        loaded: The model, its tokenizer and its identity.
        calibration: Text to measure layers on; the built-in prose when omitted.
        rows: "rms" or "raw"; see :func:`sglp_deploy.evidence.collect.collect_layer_stats`.
        skip_positions: Leading positions left out of the similarity.
        stack: Which layers, for a model with several stacks: "encoder" or "decoder"; the first when omitted.
        progress: Called with (stage, done, total) during long work.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        calibration: CalibrationSet | None = None,
        rows: str = "rms",
        skip_positions: int = 1,
        stack: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        layer_stack(loaded.module, stack)  # an unsupported family is refused before any work
        self._stack_name = stack
        self._loaded = loaded
        self._calibration = (calibration or CalibrationSet.builtin()).at_most(table_of_positions(loaded.module))
        self._measuring: dict[str, Any] = {"rows": rows, "skip_positions": skip_positions}
        self._progress = progress
        self._evidence: ModelEvidence | None = None
        self._batches: TokenBatches | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        calibration: CalibrationSet | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        **options: Any,
    ) -> Compressor:
        """Load a checkpoint folder, a GGUF file or a hub identifier; see :func:`sglp_deploy.models.load_model`."""
        loaded = load_model(
            model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
        return cls(loaded, calibration=calibration, **options)

    @property
    def model(self) -> nn.Module:
        """The unpruned model."""
        return self._loaded.module

    @property
    def stack(self) -> LayerStack:
        """The layers that are pruned."""
        return layer_stack(self.model, self._stack_name)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, if it has one."""
        return self._loaded.tokenizer

    @property
    def precision(self) -> str:
        """Element type of the weights: "fp32", "fp16" or "bf16"."""
        return precision(self.model)

    @property
    def source(self) -> dict[str, Any]:
        """Identity of the model, as plans record it."""
        return self._loaded.source.to_json()

    @property
    def n_layers(self) -> int:
        """Layers before pruning."""
        return self.stack.n_layers

    def evidence(self) -> ModelEvidence:
        """What planners look at: measured on the calibration data when it is asked for, and kept.

        Raises:
            UnsupportedModelError: If no task fits the model, or its layers are one module.
        """
        if self._evidence is None:
            task = task_of(self.model)
            stack = self.stack
            stack.check_distinct(type(self.model).__name__)
            self._evidence = ModelEvidence(
                self.model,
                stack,
                task,
                self._encoded,
                seed=self._calibration.seed,
                progress=self._progress,
                **self._measuring,
            )
        return self._evidence

    def stats(self) -> LayerStats:
        """Statistics of the calibration pass; taken once and kept."""
        return self.evidence().stats

    def plan(
        self,
        *,
        drop: int | float | None = None,
        keep: int | None = None,
        max_parameters: int | None = None,
        method: str = "sglp",
        preserve_pattern: bool = False,
        keep_matrix: bool = True,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> PruningPlan:
        """Decide which layers go.

        Args:
            drop: Layers to remove, or, as a float, the share of layers to remove.
            keep: Layers to keep.
            max_parameters: Parameters the pruned model may have.
            method: A planner's name.
            preserve_pattern: Remove whole periods of the layers' pattern only, for runtimes that derive a layer's type
                from its number.
            keep_matrix: Store the similarity matrix in the plan.
            options: For the planner; see :func:`sglp_deploy.plan.make_plan`.
            more: Options of the planner as well, for those whose names mean nothing here.

        Raises:
            ConfigError: If not exactly one budget is given, or a name or an option is unknown.
            PlanError: If the budget cannot be met.
            CalibrationError: If the calibration data cannot support a plan.
        """
        budget = Budget.parse(drop=drop, keep=keep, max_parameters=max_parameters)
        # What cannot work is refused before minutes of calibration.
        chosen = {**(options or {}), **more}
        read_options(method, chosen)
        budget.n_drop(self.n_layers)
        sizes = parameter_sizes(self.model, self.stack)
        check_parameter_budget(budget, sizes)
        kinds = adapter_for(self.model).kinds(self.model, self.stack) if preserve_pattern else ()
        groups = pattern_groups(kinds, self.stack.prunable) if preserve_pattern else ()
        evidence = self.evidence()
        plan = make_plan(
            evidence,
            budget,
            method=method,
            groups=groups,
            model={**self.source, **sizes},
            calibration=self._calibration.facts(self._encoded()),
            task=task_of(self.model).name,
            keep_matrix=keep_matrix,
            options=chosen,
        )
        if plan.weights is not None:
            plan.weights.check(self.model)
        return materializing.with_config_changes(plan, self.model, self._stack_name)

    def plan_by_hand(self, drop: Sequence[int]) -> PruningPlan:
        """The plan that removes the layers a person names; works for every supported model and measures nothing.

        Raises:
            PlanError: If a layer is named twice or outside the model, or none would stay.
            UnsupportedModelError: If a named layer must stay, with the reason.
        """
        model = {**self.source, **parameter_sizes(self.model, self.stack)}
        plan = by_hand_plan(self.n_layers, drop, model)
        self.stack.check_removable(plan.drop)
        return materializing.with_config_changes(plan, self.model, self._stack_name)

    def repair(
        self,
        plan: PruningPlan,
        method: str = "refit",
        *,
        calibration: CalibrationSet | None = None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> PruningPlan:
        """Make up for the removed layers by changing kept weights; see :func:`sglp_deploy.repairs.judged.repaired`.

        Args:
            plan: Which layers go.
            method: Name of a repair: "refit", "local", "linear" or "scale".
            calibration: What to fit on; the calibration data of this object when omitted.
            options: For the repair.
            more: Options of the repair as well.
        """
        chosen = self._calibration if calibration is None else calibration
        batches = self._encoded() if calibration is None else task_of(self.model).encode(calibration, self._loaded)
        return repaired(
            self._loaded,
            plan,
            batches,
            task=task_of(self.model),
            method=method,
            calibration=chosen.facts(batches),
            options={**(options or {}), **more},
            progress=self._progress,
        )

    def heal(
        self,
        plan: PruningPlan,
        *,
        corpus: Sequence[CalibrationSet | str] | None = None,
        options: Mapping[str, Any] | HealOptions | None = None,
        folder: str | Path | None = None,
        **more: Any,
    ) -> PruningPlan:
        """Train the kept layers on what the unpruned model says; see :func:`sglp_deploy.healing.healed.healed`.

        Args:
            plan: Which layers go, and the weights training starts from.
            corpus: Texts to mix in equal shares, or names of some: "builtin", "general" (news and articles, where
                gensim is installed), "written" (by the unpruned model).  When omitted: the calibration data of this
                object and these three.
            options: Fields of :class:`sglp_deploy.healing.options.HealOptions`; a budget (tokens, minutes) is needed.
            folder: Where the state of the training is kept while it lasts, so that a killed one goes on.
            more: Options as well.
        """
        chosen = options if isinstance(options, HealOptions) else read_heal_options({**(options or {}), **more})
        parts = default_parts(self._calibration, tokenizer=self.tokenizer is not None) if corpus is None else corpus
        mix = mix_of(parts, self._loaded, chosen, optional=corpus is None, progress=self._progress)
        at, by = None if folder is None else Path(folder), self._progress
        return healed(self._loaded, plan, mix, task=task_of(self.model), options=chosen, folder=at, progress=by)

    def keep_all(self) -> PruningPlan:
        """The baseline: a plan that removes nothing."""
        plan = keep_all_plan(self.n_layers, self.source, seed=self._calibration.seed)
        return plan if self._stack_name is None else replace(plan, stack=self.stack.path)

    def materialize(self, plan: PruningPlan) -> CompressedModel:
        """The smaller model; it shares its tensors with the unpruned one, but for those of the plan's overlay."""
        return materializing.materialize(self.model, plan, self._loaded.source, tokenizer=self.tokenizer)

    def save(self, plan: PruningPlan, out_dir: str | Path) -> Path:
        """Write the smaller model as a checkpoint of its own library."""
        return materializing.save_checkpoint(self.materialize(plan), out_dir)

    def export(self, plan: PruningPlan, to: str, out_dir: str | Path, **options: Any) -> ExportArtifact:
        """Write an artifact of the smaller model with the exporter called ``to``."""
        exporter = registry.exporter(to)
        pruned = self.materialize(plan)
        check_layer_types(exporter, getattr(pruned.module, "config", None), plan.config_changes, plan.keep)
        return exporter.export(pruned, Path(out_dir), **options)

    def verify(
        self,
        artifact: ExportArtifact,
        plan: PruningPlan | None = None,
        *,
        overlay: str | Path | None = None,
        text: CalibrationSet | None = None,
        threads: int | None = None,
    ) -> ParityReport:
        """Compare an artifact with the model it was made from, whose removed layers hand on what they are given.

        Args:
            artifact: What to certify.
            plan: The plan it was made by; read from the artifact's folder when omitted.
            overlay: The file of the weights that the plan changes, when it has moved.
            text: Natural text for the prompts; the held-out built-in prose when omitted.
            threads: Threads for both sides.

        Raises:
            PlanError: If the artifact belongs to another model or plan.
            ArtifactError: If the cache of a decoder's graph is not laid out for the pruned model, or the plan's overlay
                is missing, damaged or of another plan.
            ConfigError: If its runner cannot generate, where the artifact is of a decoder with a cache.
        """
        return verify_with_plan(
            artifact, self._loaded, plan, overlay=overlay, text=text, calibration=self._encoded, threads=threads,
            progress=self._stage("verify"),
        )  # fmt: skip

    def evaluate(
        self,
        plan: PruningPlan,
        text: CalibrationSet | None = None,
        *,
        repaired: PruningPlan | None = None,
        tasks: Sequence[JudgedTask] = (),
        sample_tokens: int = 0,
    ) -> dict[str, Any]:
        """Quality of the dense and the pruned model on held-out data, as ``quality.json`` holds it.

        Where repairs and healing made all weights that the plan changes, the pruned model without them is judged too.

        Args:
            plan: What is judged.
            text: To take perplexity on; the task's own held-out data when omitted.
            repaired: The plan before healing, where it was repaired before; judged too.
            tasks: To judge both models by, from :func:`sglp_deploy.tasks.asked.read_tasks`; under ``tasks``.
            sample_tokens: How many tokens both models write after some prompts; under ``generation``, nothing when 0.
        """
        task = task_of(self.model)
        held_out = text or task.held_out(max_tokens=16_384, sequence_length=512)
        batches = task.encode(held_out, self._loaded)
        dense = task.evaluate(self.model, batches, progress=self._stage("evaluate dense"))
        pruned = task.evaluate(self.materialize(plan).module, batches, progress=self._stage("evaluate pruned"))
        before: dict[str, Any] = {"unrepaired": self._unrepaired(plan, task, batches)}
        if repaired is not None and repairs_of(repaired.overlay) and repaired.overlay != plan.overlay:
            before["repaired"] = self._judged(repaired, task, batches, "evaluate repaired")
        steps = [str(record["repair"]) for record in repairs_of(plan.overlay)]
        found = task.compare(dense, pruned, batches, held_out.source, **before) | {"repairs": steps}
        if tasks:
            found["tasks"] = self.evaluate_tasks(tasks, plan)
        if sample_tokens:
            found["generation"] = self.sample(sample_tokens, plan)
        return found

    def evaluate_tasks(self, tasks: Sequence[JudgedTask], plan: PruningPlan | None = None) -> dict[str, dict[str, Any]]:
        """Task to what the unpruned and the pruned model get, with the difference over the same items.

        Args:
            tasks: From :func:`sglp_deploy.tasks.asked.read_tasks`.
            plan: Which layers go; the unpruned model is judged alone when omitted.

        Raises:
            CalibrationError: If the model has no tokenizer, or a score is not finite.
            ConfigError: If an item does not fit the model.
            UnsupportedModelError: If it is no decoder language model.
        """
        pruned = None if plan is None else self.materialize(plan).module
        return judged(self.model, pruned, self.tokenizer, tasks, self._stage)

    def sample(self, n_tokens: int, plan: PruningPlan) -> dict[str, Any]:
        """What the unpruned and the pruned model write, ``n_tokens`` at most, and how much they repeat themselves."""
        return sampled(self.model, self.materialize(plan).module, self.tokenizer, n_tokens, self._stage)

    def _unrepaired(self, plan: PruningPlan, task: Task, batches: TokenBatches) -> Any:
        """Quality of the pruned model before its repair; None where there is no such model, or no figure for it."""
        repairs = repairs_of(plan.overlay)
        # Weights that a planner made are in the overlay too, and without them it would be a third model.
        if plan.overlay is None or not repairs or len(repairs) < len(plan.overlay["made_by"]):
            return None
        return self._judged(replace(plan, overlay=None, weights=None), task, batches, "evaluate unrepaired")

    def _judged(self, plan: PruningPlan, task: Task, batches: TokenBatches, stage: str) -> Any:
        """Quality of the pruned model; None where there is no figure for it."""
        try:
            return task.evaluate(self.materialize(plan).module, batches, progress=self._stage(stage))
        except CalibrationError:  # too broken for a figure, which a repair may have mended
            return None

    def _encoded(self) -> TokenBatches:
        if self._batches is None:
            self._batches = self._calibration.encode(self.tokenizer)
        return self._batches

    def _stage(self, name: str) -> Callable[[int, int], None] | None:
        report = self._progress
        return None if report is None else lambda done, total: report(name, done, total)
