"""The one object a user holds: a model, its calibration text, and the stages in order.  It adds nothing of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import materialize as materializing
from sglp_deploy import registry
from sglp_deploy._names import unknown_name
from sglp_deploy.adapters import LoadedModel, layer_stack, load_model, precision
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact
from sglp_deploy.calibration import CalibrationSet, TokenBatches
from sglp_deploy.collect import collect_layer_stats
from sglp_deploy.errors import ConfigError, PlanError
from sglp_deploy.evaluate import Perplexity, perplexity, quality_report
from sglp_deploy.materialize import CompressedModel
from sglp_deploy.parity import ParityReport, check_parity, prompt_cases
from sglp_deploy.plan import Budget, PruningPlan, keep_all_plan, make_plan, planner_names
from sglp_deploy.protocols import GeneratingRunner
from sglp_deploy.reference import TorchRunner
from sglp_deploy.statistics import LayerStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]

# A window this long costs minutes to go beyond on a CPU; longer ones are left to the user's own prompts.
_LONGEST_WINDOW_CHECKED = 4096


class Compressor:
    """Plans, materializes, exports and verifies shallower versions of one model, which it never alters.

    Args:
        loaded: The model, its tokenizer and its identity.
        calibration: Text to measure layers on; the built-in prose when omitted.
        rows: "rms" or "raw"; see :func:`sglp_deploy.collect.collect_layer_stats`.
        skip_positions: Leading positions left out of the similarity.
        progress: Called with (stage, done, total) during long work.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        calibration: CalibrationSet | None = None,
        rows: str = "rms",
        skip_positions: int = 1,
        progress: Progress | None = None,
    ) -> None:
        layer_stack(loaded.module)  # an unsupported family is refused before any work
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
        """Load a checkpoint folder, a GGUF file or a hub identifier; see :func:`sglp_deploy.adapters.load_model`."""
        loaded = load_model(
            model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
        return cls(loaded, calibration=calibration, **options)

    @property
    def model(self) -> PreTrainedModel:
        """The unpruned model."""
        return self._loaded.module

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
        return layer_stack(self.model).n_layers

    def stats(self) -> LayerStats:
        """Statistics of the calibration pass; taken once and kept."""
        if self._stats is None:
            self._stats = collect_layer_stats(
                self.model,
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
        **options: Any,
    ) -> PruningPlan:
        """Decide which layers go.

        Args:
            drop: Layers to remove, or, as a float, the share of layers to remove.
            keep: Layers to keep.
            max_parameters: Parameters the pruned model may have.
            method: A planner's name.
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
        return make_plan(
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

    def keep_all(self) -> PruningPlan:
        """The baseline: a plan that removes nothing."""
        return keep_all_plan(self.n_layers, self.source, seed=self._calibration.seed)

    def materialize(self, plan: PruningPlan) -> CompressedModel:
        """The smaller model, sharing its tensors with the unpruned one."""
        return materializing.materialize(self.model, plan, self._loaded.source, tokenizer=self.tokenizer)

    def save(self, plan: PruningPlan, out_dir: str | Path) -> Path:
        """Write the smaller model as a Hugging Face checkpoint."""
        return materializing.save_checkpoint(self.materialize(plan), out_dir)

    def export(self, plan: PruningPlan, to: str, out_dir: str | Path, **options: Any) -> ExportArtifact:
        """Write an artifact of the smaller model with the exporter called ``to``."""
        return registry.exporter(to).export(self.materialize(plan), Path(out_dir), **options)

    def verify(
        self,
        artifact: ExportArtifact,
        plan: PruningPlan | None = None,
        *,
        text: CalibrationSet | None = None,
        threads: int | None = None,
    ) -> ParityReport:
        """Compare an artifact with the pruned torch model it was made from.

        Args:
            artifact: What to certify.
            plan: The plan it was made by; read from the artifact's folder when omitted.
            text: Natural text for the prompts; the held-out built-in prose when omitted.
            threads: Threads for both sides.

        Raises:
            PlanError: If the artifact belongs to another model or plan.
            ConfigError: If its runner cannot generate.
        """
        plan = plan or PruningPlan.load(artifact.path / PLAN_FILE)
        if plan.digest() != artifact.plan_digest:
            raise PlanError(
                f"the artifact in {artifact.path} was made by another plan ({artifact.plan_digest[:12]}, not "
                f"{plan.digest()[:12]}); a certificate would be about something else; give the plan it was made by"
            )
        pruned = self.materialize(plan)
        runner = registry.exporter(artifact.format).open(artifact, device=str(self.model.device), threads=threads)
        if not isinstance(runner, GeneratingRunner):
            raise ConfigError(
                f"the {artifact.format} runner cannot generate; decoder parity needs prefill and decode; add them"
            )
        window = _window(pruned.module)
        described = f"PyTorch, {pruned.n_layers} layers, {self.precision}"
        if window is not None and window > _LONGEST_WINDOW_CHECKED:
            described += f"; not compared beyond its sliding window of {window} tokens"
            window = None
        with TorchRunner(pruned.module, threads=threads) as reference, runner:
            return check_parity(
                artifact,
                runner,
                reference,
                prompt_cases(self._prompt_tokens(text), window=window),
                runner_name=str(artifact.details.get("runner", type(runner).__name__)),
                reference_name=described,
                progress=self._stage("verify"),
            )

    def evaluate(self, plan: PruningPlan, text: CalibrationSet | None = None) -> dict[str, Any]:
        """Perplexity of the dense and the pruned model on held-out text, as ``quality.json`` holds it."""
        held_out = text or CalibrationSet.builtin_held_out(max_tokens=16_384, sequence_length=512)
        batches = held_out.encode(self.tokenizer)
        dense = self._perplexity(self.model, batches, "evaluate dense")
        pruned = self._perplexity(self.materialize(plan).module, batches, "evaluate pruned")
        return quality_report(dense, pruned, batches, held_out.source)

    def _perplexity(self, module: PreTrainedModel, batches: TokenBatches, stage: str) -> Perplexity:
        return perplexity(module, batches, progress=self._stage(stage))

    def _sizes(self) -> dict[str, Any]:
        """Parameter counts that a speedup's ceiling is worked out from."""
        head = self.model.get_output_embeddings()
        layers = layer_stack(self.model).layers
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


def _window(model: PreTrainedModel) -> int | None:
    """The sliding window, if any layer has one."""
    window = getattr(model.config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    return window if slides and isinstance(window, int) else None
