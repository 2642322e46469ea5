"""The one object a user holds: a model, its calibration text, and the stages in order.  It adds nothing of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import materialize as materializing
from sglp_deploy import registry
from sglp_deploy._names import unknown_name
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact
from sglp_deploy.errors import PlanError, UnsupportedModelError
from sglp_deploy.evidence.collect import collect_layer_stats
from sglp_deploy.evidence.statistics import LayerStats
from sglp_deploy.evidence.text import CalibrationSet, TokenBatches
from sglp_deploy.materialize import CompressedModel
from sglp_deploy.models import LayerStack, LoadedModel, adapter_for, layer_stack, load_model, precision
from sglp_deploy.models.patterns import check_layer_types, pattern_groups
from sglp_deploy.models.samples import require_next_token_loss
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.parity.verify import verify_artifact
from sglp_deploy.plan import Budget, PruningPlan, by_hand_plan, keep_all_plan, make_plan, planner_names
from sglp_deploy.tasks.language import Perplexity, perplexity, quality_report

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        self._calibration = calibration or CalibrationSet.builtin()
        self._rows = rows
        self._skip_positions = skip_positions
        self._progress = progress
        self._stats: LayerStats | None = None
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

    def stats(self) -> LayerStats:
        """Statistics of the calibration pass; taken once and kept."""
        if self._stats is None:
            self._check_measurable()
            self._stats = collect_layer_stats(
                cast("PreTrainedModel", self.model),
                self._encoded(),
                rows=self._rows,
                skip_positions=self._skip_positions,
                seed=self._calibration.seed,
                progress=self._stage("calibrate"),
            )
        return self._stats

    def plan(
        self,
        *,
        drop: int | float | None = None,
        keep: int | None = None,
        max_parameters: int | None = None,
        method: str = "sglp",
        preserve_pattern: bool = False,
        **options: Any,
    ) -> PruningPlan:
        """Decide which layers go.

        Args:
            drop: Layers to remove, or, as a float, the share of layers to remove.
            keep: Layers to keep.
            max_parameters: Parameters the pruned model may have.
            method: A planner's name.
            preserve_pattern: Remove whole periods of the layers' pattern only, for runtimes that derive a layer's type
                from its number.
            options: See :func:`sglp_deploy.plan.make_plan`.

        Raises:
            ConfigError: If not exactly one budget is given, or a name is unknown.
            PlanError: If the budget cannot be met.
            CalibrationError: If the calibration text cannot support a plan.
            TypeError: If ``make_plan`` has no such option.
        """
        budget = Budget.parse(drop=drop, keep=keep, max_parameters=max_parameters)
        # What cannot work is refused before minutes of calibration.
        inspect.signature(make_plan).bind_partial(**options)
        if method not in planner_names():
            raise unknown_name("method", method, planner_names())
        budget.n_drop(self.n_layers)
        self._check_parameters(max_parameters)
        if preserve_pattern:
            options["groups"] = pattern_groups(
                adapter_for(self.model).kinds(self.model, self.stack), self.stack.prunable
            )
        plan = make_plan(
            self.stats(),
            budget,
            method=method,
            model={**self.source, **self._sizes()},
            calibration={
                "digest": self._encoded().digest,
                "source": self._calibration.source,
                "sequence_length": self._calibration.sequence_length,
            },
            seed=self._calibration.seed,
            **options,
        )
        return self._with_changes(plan)

    def plan_by_hand(self, drop: Sequence[int]) -> PruningPlan:
        """The plan that removes the layers a person names; works for every supported model and measures nothing.

        Raises:
            PlanError: If a layer is named twice or outside the model, or none would stay.
            UnsupportedModelError: If a named layer must stay, with the reason.
        """
        plan = by_hand_plan(self.n_layers, drop, {**self.source, **self._sizes()})
        self.stack.check_removable(plan.drop)
        return self._with_changes(plan)

    def keep_all(self) -> PruningPlan:
        """The baseline: a plan that removes nothing."""
        plan = keep_all_plan(self.n_layers, self.source, seed=self._calibration.seed)
        return plan if self._stack_name is None else replace(plan, stack=self.stack.path)

    def materialize(self, plan: PruningPlan) -> CompressedModel:
        """The smaller model, sharing its tensors with the unpruned one."""
        return materializing.materialize(self.model, plan, self._loaded.source, tokenizer=self.tokenizer)

    def save(self, plan: PruningPlan, out_dir: str | Path) -> Path:
        """Write the smaller model as a Hugging Face checkpoint."""
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
        text: CalibrationSet | None = None,
        threads: int | None = None,
    ) -> ParityReport:
        """Compare an artifact with the model it was made from, whose removed layers hand on what they are given.

        The reference is the unpruned model itself and shares nothing with what made the artifact: no sliced
        configuration, no copied or renumbered layer, no file.

        Args:
            artifact: What to certify.
            plan: The plan it was made by; read from the artifact's folder when omitted.
            text: Natural text for the prompts; the held-out built-in prose when omitted.
            threads: Threads for both sides.

        Raises:
            PlanError: If the artifact belongs to another model or plan.
            ArtifactError: If the cache of a decoder's graph is not laid out for the pruned model.
            ConfigError: If its runner cannot generate, where the artifact is of a decoder with a cache.
        """
        plan = plan or PruningPlan.load(artifact.path / PLAN_FILE)
        if plan.digest() != artifact.plan_digest:
            raise PlanError(
                f"the artifact in {artifact.path} was made by another plan ({artifact.plan_digest[:12]}, not "
                f"{plan.digest()[:12]}); a certificate would be about something else; give the plan it was made by"
            )
        return verify_artifact(
            artifact,
            self.model,
            self.materialize(plan),
            tokens=lambda: self._prompt_tokens(text),
            threads=threads,
            progress=self._stage("verify"),
        )

    def evaluate(self, plan: PruningPlan, text: CalibrationSet | None = None) -> dict[str, Any]:
        """Perplexity of the dense and the pruned model on held-out text, as ``quality.json`` holds it."""
        require_next_token_loss(self.model)
        held_out = text or CalibrationSet.builtin_held_out(max_tokens=16_384, sequence_length=512)
        batches = held_out.encode(self.tokenizer)
        dense = self._perplexity(self.model, batches, "evaluate dense")
        pruned = self._perplexity(self.materialize(plan).module, batches, "evaluate pruned")
        return quality_report(dense, pruned, batches, held_out.source)

    def _perplexity(self, module: nn.Module, batches: TokenBatches, stage: str) -> Perplexity:
        return perplexity(cast("PreTrainedModel", module), batches, progress=self._stage(stage))

    def _sizes(self) -> dict[str, Any]:
        """Parameter counts that a speedup's ceiling is worked out from."""
        find_head = getattr(self.model, "get_output_embeddings", lambda: None)
        head = find_head()
        layers = self.stack.layers
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layer_parameters": [sum(p.numel() for p in layer.parameters()) for layer in layers],
            "head_parameters": 0 if head is None else sum(p.numel() for p in head.parameters()),
        }

    def _check_parameters(self, max_parameters: int | None) -> None:
        """Refuse a parameter budget below the model with its smallest layer alone; segments may still ask for more."""
        sizes = self._sizes()
        least = sizes["parameters"] - sum(sizes["layer_parameters"]) + min(sizes["layer_parameters"])
        if max_parameters is not None and max_parameters < least:
            raise PlanError(
                f"max_parameters={max_parameters} cannot be met; embeddings, head and one layer alone have {least} of "
                f"{sizes['parameters']}; pass max_parameters>={least}"
            )

    def _check_measurable(self) -> None:
        """Refuse, before any work, to measure what the calibration pass cannot."""
        require_next_token_loss(self.model)
        if self.stack.shares_one_module:
            raise UnsupportedModelError(
                f"the layers of {type(self.model).__name__} are one module run {self.n_layers} times; there is nothing "
                "to choose between; name the layers yourself: plan MODEL --drop-layers 2,5 (Compressor.plan_by_hand)"
            )

    def _with_changes(self, plan: PruningPlan) -> PruningPlan:
        """``plan`` with the stack it counts in and what it changes in the configuration, for a person to review."""
        changes = adapter_for(self.model).changes(self.model, self.stack, plan.keep)
        stack = None if self.stack.path == layer_stack(self.model).path else self.stack.path
        return replace(plan, stack=stack, config_changes=tuple(change.to_json() for change in changes))

    def _encoded(self) -> TokenBatches:
        if self._batches is None:
            self._batches = self._calibration.encode(self.tokenizer)
        return self._batches

    def _prompt_tokens(self, text: CalibrationSet | None) -> NDArray[np.int64]:
        if text is None and self.tokenizer is None:
            # No tokenizer, no natural text: the calibration rows are what this model was given.
            batches = self._encoded()
        else:
            batches = (text or CalibrationSet.builtin_held_out(max_tokens=8_192)).encode(self.tokenizer)
        tokens: NDArray[np.int64] = batches.input_ids[batches.attention_mask == 1]
        return tokens

    def _stage(self, name: str) -> Callable[[int, int], None] | None:
        report = self._progress
        if report is None:
            return None
        return lambda done, total: report(name, done, total)
