"""Certify an artifact: open it, find the reference it must agree with, run the right cases through both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sglp_deploy import materialize as materializing
from sglp_deploy import registry
from sglp_deploy.artifact import BEYOND_WINDOW, DECODE_STEPS, PAST, PLAN_FILE, ExportArtifact
from sglp_deploy.errors import ArtifactError, ConfigError, PlanError
from sglp_deploy.materialize import CompressedModel
from sglp_deploy.models import layer_stack, precision
from sglp_deploy.models.proof import overlaid, passed_over
from sglp_deploy.models.samples import attention_window, generates, main_input, most_tokens
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.parity.cache import check_cache_layout
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.parity.decoder import check_parity, prompt_cases
from sglp_deploy.parity.diagnosis import (
    StoredTensor,
    cache_faults,
    read_stored,
    stored_bytes,
    stored_type_fault,
    weight_faults,
)
from sglp_deploy.parity.forward import check_forward_parity, forward_cases
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.plan import PruningPlan
from sglp_deploy.protocols import GeneratingRunner, Runner
from sglp_deploy.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sglp_deploy.evidence.text import CalibrationSet, TokenBatches
    from sglp_deploy.models import LoadedModel

# A window this long costs minutes to go beyond on a CPU; longer ones are left to the user's own prompts.
LONGEST_WINDOW_CHECKED = 4096
_PROMPT_TEXT_TOKENS = 8_192


def verify_with_plan(
    artifact: ExportArtifact,
    loaded: LoadedModel,
    plan: PruningPlan | None,
    *,
    overlay: str | Path | None = None,
    text: CalibrationSet | None = None,
    calibration: Callable[[], TokenBatches],
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """:func:`verify_artifact` for a model and a plan that a user gives.

    Args:
        artifact: What to certify.
        loaded: The unpruned model, its tokenizer and its identity.
        plan: The plan the artifact was made by; read from its folder when None.
        overlay: The file of the weights that the plan changes; looked for where it can be expected when None.
        text: Natural text for the prompts; the held-out built-in prose when omitted.
        calibration: Rows for the prompts of a model without a tokenizer.
        threads: Threads for both sides.
        progress: Called with (cases done, cases in all).

    Raises:
        PlanError: If the artifact belongs to another model or plan, or an overlay is given and the plan has none.
        ArtifactError: If the plan's overlay is nowhere to be found, damaged, or of another plan.
    """
    plan = plan or PruningPlan.load(artifact.path / PLAN_FILE)
    if plan.digest() != artifact.plan_digest:
        raise PlanError(
            f"the artifact in {artifact.path} was made by another plan ({artifact.plan_digest[:12]}, not "
            f"{plan.digest()[:12]}); a certificate would be about something else; give the plan it was made by"
        )

    plan = _with_weights(plan, artifact, overlay)

    def tokens() -> NDArray[np.int64]:
        if text is None and loaded.tokenizer is None:
            # No tokenizer, no natural text: the calibration rows are what this model was given.
            batches = calibration()
            return np.asarray(batches.input_ids[batches.attention_mask == 1])
        task = task_of(loaded.module)
        return task.prompts(text or task.held_out(max_tokens=_PROMPT_TEXT_TOKENS), loaded)

    pruned = materializing.materialize(loaded.module, plan, loaded.source, tokenizer=loaded.tokenizer)
    return verify_artifact(artifact, loaded.module, pruned, tokens=tokens, threads=threads, progress=progress)


def _with_weights(plan: PruningPlan, artifact: ExportArtifact, given: str | Path | None) -> PruningPlan:
    """``plan`` with its overlay: the one given, one that is at hand, the recorded file, or that of the run folder.

    An artifact's folder holds none: other programs load every ``*.safetensors`` file they find in one.
    """
    if given is not None:
        return plan.with_weights_from(given)
    if plan.overlay is None or plan.weights is not None:
        return plan
    recorded = artifact.model.get("overlay_file")
    # An artifact of a run lies in artifacts/NAME, its checkpoint one level higher.
    places = [Path(recorded)] if recorded else []
    places += [above / OVERLAY_FILE for above in artifact.path.absolute().parents[:2]]
    wrong: list[str] = []
    for place in places:
        if place.is_file():
            found = plan.with_weights_from(place)
            try:
                assert found.weights is not None
                found.weights.tensors  # noqa: B018  # reading them compares the digest
            except ArtifactError as error:
                wrong.append(str(error))  # of another plan by now; the right one may lie elsewhere
                continue
            return found
    if wrong:
        raise ArtifactError(wrong[0])
    digest = str(plan.overlay["digest"])[:12]
    raise ArtifactError(
        f"the weights that the plan of {artifact.path} changes (digest {digest}) are not at hand; {places[0]} does not "
        "exist, and without them nothing is known to compare with; name the file with --overlay (verify(overlay=...))"
    )


def verify_artifact(
    artifact: ExportArtifact,
    original: nn.Module,
    pruned: CompressedModel,
    *,
    tokens: Callable[[], NDArray[np.int64]],
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare an artifact with the unpruned model whose removed layers hand on what they are given.

    Weights that the plan changes are loaded into it under the names they have there.  The reference shares nothing with
    what made the artifact: no sliced configuration, no copied or renumbered layer, no mapping of names, no file.  An
    artifact that is a checkpoint is also compared bit for bit with the pruned model in memory.  One whose stored
    weights are of another type than its manifest says fails, and where one fails the certificate names the tensor and
    the layer, as far as they can be known (:mod:`sglp_deploy.parity.diagnosis`).

    Args:
        artifact: What to certify.
        original: The unpruned model.
        pruned: The pruned model the artifact was made from.
        tokens: Natural text for the prompts, shape (n,); asked for only when the model takes prompts.
        threads: Threads for both sides.
        progress: Called with (cases done, cases in all).

    Returns:
        The certificate; failing is a result, not an exception.

    Raises:
        ArtifactError: If the cache of a decoder's graph is not laid out for the pruned model, or the artifact calls
            itself a single forward pass and has a cache.
        ConfigError: If its runner cannot generate, where the artifact is of a decoder with a cache.
        BackendError: If a side fails to run.
    """
    device = str(next(original.parameters()).device)
    exporter = registry.exporter(artifact.format)
    runner = exporter.open(artifact, device=device, threads=threads)
    faults: list[str] = []
    described = f"PyTorch, {pruned.n_layers} layers, {precision(original)}"
    config = getattr(original, "config", None)
    takes_tokens = main_input(original) == "input_ids"
    window = attention_window(config, pruned.plan.keep) if takes_tokens and config is not None else None
    positions = most_tokens(original) if takes_tokens and config is not None else sys.maxsize
    if window is not None and window > min(LONGEST_WINDOW_CHECKED, positions - BEYOND_WINDOW - DECODE_STEPS):
        described += f"; not compared beyond its sliding window of {window} tokens"
        window = None
    facts: dict[str, Any] = {"reference_name": described, "progress": progress}
    if generates(original) and not _is_forward(artifact):
        if not isinstance(runner, GeneratingRunner):
            raise ConfigError(
                f"the {artifact.format} runner cannot generate; decoder parity needs prefill and decode; add them"
            )
        check_cache_layout(artifact, cast("PreTrainedModel", pruned.module))
        prompts = prompt_cases(tokens(), window=window, positions=positions)
        with _reference(original, pruned, threads) as reference, runner:
            report = check_parity(artifact, runner, reference, prompts, runner_name=_name(artifact, runner), **facts)
            if not report.passed:
                faults += cache_faults(runner, pruned.module, artifact)
    else:
        cases = forward_cases(original, window=window)
        with _reference(original, pruned, threads) as reference, runner:
            report = check_forward_parity(
                artifact, runner, reference, cases, runner_name=_name(artifact, runner), **facts
            )
    stored = read_stored(exporter, artifact)  # after the runtime, which says more of files that cannot be read
    faults += _false_facts(artifact, pruned, stored)
    if wrong_type := stored_type_fault(artifact.precision, stored, pruned.module):
        faults.insert(0, wrong_type)
    if not report.passed:
        faults += weight_faults(pruned.module, stored)
    faults += _difference(exporter, artifact, pruned)
    stands_in_for = str(getattr(runner, "stands_in_for", "") or "")
    return replace(report, reasons=(*report.reasons, *faults), stands_in_for=stands_in_for)


def _false_facts(artifact: ExportArtifact, pruned: CompressedModel, stored: Sequence[StoredTensor]) -> list[str]:
    """What the manifest says of the model and is not so; benchmarks and reports quote it."""
    faults = []
    if artifact.n_layers != pruned.n_layers:
        faults.append(f"the manifest says {artifact.n_layers} layers, the plan keeps {pruned.n_layers}")
    if artifact.model.get("fingerprint") != pruned.source.fingerprint:
        faults.append("the manifest names another model than the one compared with")
    # Those of parts behind the model lie in folders of their own.
    weights = [each.bytes for name, each in artifact.files.items() if name.endswith(".safetensors") and "/" not in name]
    least, most = (sum(weights), sum(weights)) if weights else (0, artifact.total_bytes)
    if not least <= artifact.weight_bytes <= most:
        faults.append(f"the manifest says {artifact.weight_bytes} bytes of weights, the files hold {most}")
    elif (said := artifact.weight_bytes) < stored_bytes(stored) and said < (least := stored_bytes(stored, once=True)):
        faults.append(f"the manifest says {artifact.weight_bytes} bytes of weights, the stored tensors take {least}")
    return faults


def _is_forward(artifact: ExportArtifact) -> bool:
    """Whether the artifact is one forward pass without a cache, as its manifest says and its inputs must bear out."""
    if artifact.details.get("interface") != "forward":
        return False
    cached = [spec.name for spec in artifact.inputs if PAST.removesuffix(".") in spec.name]
    if cached:
        raise ArtifactError(
            f"the manifest in {artifact.path} calls the graph a forward pass and lists the cache input {cached[0]}; "
            "its decoding would go unchecked; export it again"
        )
    return True


def _difference(exporter: Any, artifact: ExportArtifact, pruned: CompressedModel) -> list[str]:
    """What in an artifact's files is not ``pruned``: by its exporter's own comparison, else where it is a checkpoint.

    A checkpoint is compared bit for bit and setting for setting: numbers have bounds, and another reader of the same
    files may believe an entry that this one ignores.
    """
    compare = getattr(exporter, "difference", None)
    if compare is not None:
        found = compare(artifact, pruned)
        return [found] if found else []
    if not list(artifact.path.glob("*.safetensors")):
        return []
    try:
        materializing.check_reload(pruned, artifact.path)
    except ArtifactError as error:
        return [str(error)]
    return []


@contextmanager
def _reference(original: nn.Module, pruned: CompressedModel, threads: int | None) -> Iterator[TorchRunner]:
    """The unpruned model with the overlay under its own names and the removed layers passed over.

    Layers that are one module cannot be told apart; such a model takes no overlay.
    """
    stack = layer_stack(original, pruned.plan.stack)
    if stack.shares_one_module:
        with TorchRunner(pruned.module, threads=threads) as runner:
            yield runner
    else:
        with (
            overlaid(original, pruned.plan.require_weights()),
            passed_over(stack, pruned.plan.keep),
            TorchRunner(original, threads=threads) as runner,
        ):
            yield runner


def _name(artifact: ExportArtifact, runner: Runner) -> str:
    """What ran, for the certificate; only a runner that runs knows whether it is the runtime or stands in for it."""
    return str(getattr(runner, "description", "") or artifact.details.get("runner") or type(runner).__name__)
