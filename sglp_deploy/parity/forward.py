"""Parity of artifacts that run forward only: encoders, vision, speech, encoder-decoders, decoders without a KV cache.

The rules are those of decoders (:mod:`sglp_deploy.parity.decoder`).  The reference is the unpruned model in PyTorch,
its removed layers passed over.  Its own noise floor counts.  A failing comparison is a result.  The cases differ from
what was traced in every size that may vary, because a size that was burnt into a graph shows at any other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglp_deploy.artifact import BEYOND_WINDOW
from sglp_deploy.errors import BackendError
from sglp_deploy.models.samples import main_input, most_tokens, sample_inputs
from sglp_deploy.parity import distances
from sglp_deploy.parity.bounds import ForwardThresholds, forward_thresholds_for
from sglp_deploy.parity.certificate import ParityReport, judge_forward_case
from sglp_deploy.parity.certify import certify, run_side

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.protocols import Runner

# (rows, tokens); none is what was traced with, and 80 goes beyond the 64 tokens some recurrences take at once.
_TEXT_SIZES = ((1, 7), (3, 17), (2, 80))
_IMAGE_ROWS = (1, 3)
_SPEECH_SIZES = ((1, 0.75), (3, 1.0))  # rows, share of the sample's length


@dataclass(frozen=True)
class ForwardCase:
    """Named inputs for one comparison.

    Attributes:
        name: What the report calls it.
        inputs: Arrays by input name; floating ones are float32, a runner casts them to what it takes.
        valid: Which positions of the output count, shape (batch, positions); all of them when None.
    """

    name: str
    inputs: Mapping[str, NDArray[Any]]
    valid: NDArray[np.bool_] | None = None


def forward_cases(module: nn.Module, *, window: int | None = None) -> tuple[ForwardCase, ...]:
    """The standard cases for ``module``: other batch sizes, other lengths, with and without padding.

    Text is as long as the model's table of positions allows.  Images have the model's own size.

    Args:
        module: The unpruned model.
        window: Attention window in tokens; adds rows 64 tokens longer, because a wrong local layer shows only there.

    Raises:
        UnsupportedModelError: If what the model takes as input is unknown.
    """
    name = main_input(module)
    if name == "input_ids":
        most = most_tokens(module)
        sizes = [(rows, min(tokens, most)) for rows, tokens in _TEXT_SIZES]
        if window and window + BEYOND_WINDOW <= most:
            sizes.append((2, window + BEYOND_WINDOW))
        return tuple(
            _case(module, f"{rows} of {tokens} tokens", sample_inputs(module, rows=rows, tokens=tokens, seed=number))
            for number, (rows, tokens) in enumerate(dict.fromkeys(sizes), 1)
        )
    if name == "input_values":
        cases = []
        for number, (rows, share) in enumerate(_SPEECH_SIZES):
            inputs = sample_inputs(module, rows=rows, seed=number + 1)
            inputs.setdefault("attention_mask", torch.ones_like(inputs[name], dtype=torch.int64))
            samples = int(inputs[name].shape[1] * share)
            cut = {key: value[:, :samples] for key, value in inputs.items()}
            cases.append(_case(module, f"{rows} of {samples} samples", cut))
        return tuple(cases)
    return tuple(
        _case(module, f"{rows} of {name}", sample_inputs(module, rows=rows, tokens=tokens, seed=rows))
        for rows, tokens in zip(_IMAGE_ROWS, (14, 40), strict=True)
    )


def check_forward_parity(
    artifact: ExportArtifact,
    runner: Runner,
    reference: Runner,
    cases: Sequence[ForwardCase],
    *,
    thresholds: ForwardThresholds | None = None,
    runner_name: str = "",
    reference_name: str = "PyTorch",
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare the main output of ``runner`` with that of ``reference`` on every case and judge.

    Args:
        artifact: What ``runner`` executes; its digest goes on the certificate.
        runner: An entered runner of the artifact.
        reference: An entered runner of what it is judged by: the unpruned model, its removed layers passed over.  It
            returns exactly one output.
        cases: From :func:`forward_cases`.
        thresholds: Bounds; by the artifact's precision when omitted.
        runner_name: What executed the artifact, for the certificate.
        reference_name: What it is compared with, for the certificate.
        progress: Called with (cases done, cases in all).

    Returns:
        The certificate; failing is a result, not an exception.

    Raises:
        BackendError: If a side fails to run a case, or the artifact lacks the reference's output or gives it another
            shape.
    """
    bounds = thresholds or forward_thresholds_for(artifact.precision)
    judged, judge = f"the {artifact.format} artifact", f"the reference ({reference_name})"

    def measure(case: ForwardCase) -> tuple[dict[str, Any], dict[str, Any]]:
        ((output, wanted),) = run_side(judge, case.name, reference.forward, case.inputs).items()
        # The same rows twice in one batch: another shape for every matrix product, the same mathematics.
        doubled = {name: np.concatenate([value, value]) for name, value in case.inputs.items()}
        again = run_side(judge, case.name, reference.forward, doubled)[output][: len(wanted)]
        got = _of(judged, runner, case, output, wanted.shape)
        noise, _ = _compare(output, wanted, again, case, bounds.margin)
        statistics, worst = _compare(output, wanted, got, case, bounds.margin)
        record = {
            "name": case.name,
            "passed": False,
            "output": output,
            "positions": int(_vectors(wanted, case.valid)[0].shape[0]),
            "statistics": statistics or None,
            "worst": worst,
            "last_position_max_abs": None,
            "greedy": None,
        }
        return record, noise

    return certify(
        artifact,
        cases,
        measure,
        judge_forward_case,
        bounds,
        over_noise=("max_relative", "kl_p99", "kl_max"),
        runner_name=runner_name or type(runner).__name__,
        reference_name=reference_name,
        progress=progress,
    )


def _case(module: nn.Module, name: str, inputs: Mapping[str, torch.Tensor]) -> ForwardCase:
    mask = inputs.get("attention_mask")
    padded = mask is not None and bool((mask == 0).any())
    arrays = {
        key: (value.float() if value.is_floating_point() else value).cpu().numpy() for key, value in inputs.items()
    }
    return ForwardCase(f"{name}, padded" if padded else name, arrays, _valid(module, inputs) if padded else None)


def _valid(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> NDArray[np.bool_] | None:
    """Output positions that stem from what is not padding; None where the output has other positions or none."""
    if "decoder_input_ids" in inputs:
        return None
    mask = inputs["attention_mask"]
    if main_input(module) == "input_ids":
        return np.asarray((mask == 1).cpu().numpy())
    frames_of: Any = getattr(module, "_get_feat_extract_output_lengths", None)
    if frames_of is None:
        return None
    lengths, width = frames_of(mask.sum(-1)), int(frames_of(mask.shape[1]))
    return np.asarray((torch.arange(width)[None] < lengths.cpu()[:, None]).numpy())


def _of(who: str, runner: Runner, case: ForwardCase, output: str, shape: tuple[int, ...]) -> NDArray[Any]:
    found = run_side(who, case.name, runner.forward, case.inputs)
    if output not in found:
        raise BackendError(
            f"{who} returned {', '.join(sorted(found)) or 'nothing'} on {case.name}, {output} was expected; it is not "
            "the same model; export it again"
        )
    if found[output].shape != shape:
        raise BackendError(
            f"{who} returned {output} of shape {found[output].shape} on {case.name}, {shape} was expected; it is not "
            "the same model, or a size was burnt into it; export it again"
        )
    return found[output]


def _vectors(values: NDArray[Any], valid: NDArray[np.bool_] | None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The valid positions' vectors (n, width) in float64 and their places (n, 2): row, position."""
    if values.ndim == 4:  # feature maps: channels are the vector, pixels the positions
        values = np.moveaxis(values, 1, -1).reshape(len(values), -1, values.shape[1])
    values = values.reshape(len(values), -1, values.shape[-1])
    # An output with other positions than the input (a class for each row) is valid as a whole.
    mask = np.ones(values.shape[:2], dtype=bool) if valid is None or valid.shape != values.shape[:2] else valid
    where = np.argwhere(mask)
    return values[where[:, 0], where[:, 1]].astype(np.float64), where


def _compare(
    output: str, wanted: NDArray[Any], got: NDArray[Any], case: ForwardCase, margin: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Statistics over all valid positions, and the worst; no statistics when a value is not finite."""
    x, where = _vectors(wanted, case.valid)
    y, _ = _vectors(got, case.valid)
    fault = distances.first_not_finite(x, y)
    if fault is not None:
        side, position, index = fault
        return {}, {**_place(where[position]), "token": index, "not_finite": side}
    difference = distances.largest_difference(x, y)
    size = float(np.sqrt(np.mean(x**2)))
    worst = int(difference.argmax())
    statistics: dict[str, Any] = {
        "max_abs": float(difference.max()),
        # All zeros on one side and not on the other is infinitely wrong, which JSON cannot say.
        "max_relative": float(difference.max() / size) if size else float(np.sign(difference.max())),
        "cosine_min": float(distances.cosine(x, y).min()),
    }
    if output == "logits" and x.shape[1] > 1:
        statistics |= distances.kl_statistics(distances.kl_divergence(x, y))
        statistics |= distances.choice_statistics(distances.margins(x), distances.same_choice(x, y), margin)
    place = {**_place(where[worst]), "token": int(np.abs(x[worst] - y[worst]).argmax())}
    return statistics, {**place, "max_abs": float(difference[worst])}


def _place(where: NDArray[np.int64]) -> dict[str, Any]:
    return {"row": int(where[0]), "phase": "forward", "position": int(where[1])}
