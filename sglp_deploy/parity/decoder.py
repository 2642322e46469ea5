"""Does the artifact of a decoder compute what it was meant to compute?  A certificate with numbers, not a warning.

The reference is the unpruned model whose removed layers are passed over (:mod:`sglp_deploy.parity.verify`).  So the
question is whether materializing and exporting went right.  What pruning cost is another question
(:mod:`sglp_deploy.tasks.language`).  Both sides get the same tokens through prefill and through a filled cache, one row
and a padded batch.  Two things keep the verdict honest.  One is the noise floor of the reference itself (the same rows
in another batch shape).  The other is the reference's own margin: a flip between two tokens it can hardly tell apart is
no fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.artifact import BEYOND_WINDOW, DECODE_STEPS
from sglp_deploy.errors import BackendError, CalibrationError
from sglp_deploy.parity import distances
from sglp_deploy.parity.bounds import Thresholds, thresholds_for
from sglp_deploy.parity.certificate import ParityReport, judge_case
from sglp_deploy.parity.certify import certify, run_side

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.protocols import GeneratingRunner

PROMPT_TOKENS = (1, 17, 128)
BATCH_PROMPT_TOKENS = (9, 17, 40)  # three rows of different length, padded on the left

_POSITIONS_AT_ONCE = 64  # float64 log-softmax of 64 positions of a 262,144-word vocabulary is 128 MB
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class PromptCase:
    """Token rows for one comparison, padded on the left.

    Attributes:
        name: What the report calls it.
        input_ids: shape (batch, seq), int64.
        attention_mask: shape (batch, seq), 1 for a token.
    """

    name: str
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]


def prompt_cases(
    tokens: NDArray[np.int64], *, window: int | None = None, positions: int = sys.maxsize
) -> tuple[PromptCase, ...]:
    """The standard cases, cut from a stream of tokens of natural text.

    Args:
        tokens: shape (n,); repeated when it is too short.
        window: Sliding-window length of the model; adds a prompt 64 tokens longer, because a wrong local or global
            layer shows only beyond the window.
        positions: Length of the model's table of positions; prompts leave room in it for the steps that follow.

    Returns:
        Prompts of 1, 17 and 128 tokens, the one beyond the window if there is one, and a left-padded batch of three.

    Raises:
        CalibrationError: If there is no token.
    """
    if not len(tokens):
        raise CalibrationError("the prompt text holds no token; parity is judged on natural text; give a longer text")
    most = max(1, positions - DECODE_STEPS)
    prompts = [(length, f"prompt {length}") for length in sorted({min(length, most) for length in PROMPT_TOKENS})]
    batch = [min(length, most) for length in BATCH_PROMPT_TOKENS]
    if window:
        beyond = window + BEYOND_WINDOW
        prompts.append((beyond, f"prompt {beyond} (beyond window {window})"))
    needed = sum(length for length, _ in prompts) + sum(batch)
    stream = np.resize(np.asarray(tokens, dtype=np.int64), needed)
    cases, start = [], 0
    for length, name in prompts:
        ids = stream[start : start + length][None]
        cases.append(PromptCase(name, ids, np.ones_like(ids)))
        start += length
    width = max(batch)
    ids = np.zeros((len(batch), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(batch):
        ids[row, width - length :] = stream[start : start + length]
        mask[row, width - length :] = 1
        start += length
    cases.append(PromptCase(f"batch of {len(ids)}, padded to {width}", ids, mask))
    return tuple(cases)


def check_parity(
    artifact: ExportArtifact,
    runner: GeneratingRunner,
    reference: GeneratingRunner,
    cases: Sequence[PromptCase],
    *,
    decode_steps: int = DECODE_STEPS,
    thresholds: Thresholds | None = None,
    runner_name: str = "",
    reference_name: str = "PyTorch",
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare ``runner`` with ``reference`` on every case and judge.

    Each case: logits of every prompt position; then ``decode_steps`` steps through the cache, both sides fed the
    reference's greedy tokens, so one flip does not cascade; then the artifact decoding freely.

    Args:
        artifact: What ``runner`` executes; its digest goes on the certificate.
        runner: An entered runner of the artifact.
        reference: An entered runner of what it is judged by: the unpruned model, its removed layers passed over.
        cases: From :func:`prompt_cases`.
        decode_steps: Steps with the cache.
        thresholds: Bounds; by the artifact's precision when omitted.
        runner_name: What executed the artifact, for the certificate.
        reference_name: What it is compared with, for the certificate.
        progress: Called with (cases done, cases in all).

    Returns:
        The certificate; failing is a result, not an exception.

    Raises:
        BackendError: If a side fails to run a case, or returns logits of an unexpected shape.
    """
    bounds = thresholds or thresholds_for(artifact.precision)
    judged = _Side(f"the {artifact.format} artifact", runner)
    judge = _Side(f"the reference ({reference_name})", reference)
    return certify(
        artifact,
        cases,
        lambda case: _measure(case, judged, judge, decode_steps, bounds.margin),
        judge_case,
        bounds,
        over_noise=("kl_p99", "kl_max", "max_abs"),
        runner_name=runner_name or type(runner).__name__,
        reference_name=reference_name,
        progress=progress,
    )


@dataclass
class _Side:
    """A runner whose failures carry its name and whose shapes are checked: broadcasting would hide a wrong one."""

    name: str
    runner: GeneratingRunner
    vocabulary: int | None = None

    def prefill(self, case: PromptCase, *, last_only: bool = False) -> Logits:
        """Logits (batch, seq, vocab), or (batch, vocab) with ``last_only``."""
        ids, mask = case.input_ids, case.attention_mask
        # `all_positions` is left out where it is off: that is how a deployment calls it.
        options = {} if last_only else {"all_positions": True}
        return self._checked(case, ids.shape[:1] if last_only else ids.shape, self.runner.prefill, ids, mask, **options)

    def decode(self, case: PromptCase, tokens: NDArray[np.int64]) -> Logits:
        """Logits (batch, vocab) of one step through the cache."""
        return self._checked(case, tokens.shape, self.runner.decode, tokens)

    def _checked(
        self, case: PromptCase, leading: tuple[int, ...], call: Callable[..., Logits], *inputs: Any, **options: Any
    ) -> Logits:
        logits = run_side(self.name, case.name, call, *inputs, **options)
        vocabulary = self.vocabulary or logits.shape[-1]
        if logits.shape != (*leading, vocabulary):
            raise BackendError(
                f"{self.name} returned logits of shape {logits.shape} on {case.name}, {(*leading, vocabulary)} was "
                "expected; it is not the same model or breaks the runner protocol; export it again"
            )
        self.vocabulary = vocabulary
        return logits


def _measure(
    case: PromptCase, judged: _Side, judge: _Side, steps: int, margin: float
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Everything the verdict on one case needs, as JSON values, and the reference's statistics against itself."""
    width = case.input_ids.shape[1]
    wanted, teacher = _greedy(judge, case, steps)
    # The same rows twice in one batch: another shape for every matrix product, the same mathematics.
    doubled = PromptCase(case.name, np.tile(case.input_ids, (2, 1)), np.tile(case.attention_mask, (2, 1)))
    again = _forced(judge, doubled, np.tile(teacher, (2, 1)))[: len(case.input_ids)]
    noise, _ = _compare(wanted, again, case, margin)
    del again
    judged.vocabulary = judge.vocabulary
    got = _forced(judged, case, teacher)
    last = judged.prefill(case, last_only=True)
    free, finite, own = _free_run(judged, case, last, steps)
    statistics, worst = _compare(wanted, got, case, margin)
    if statistics and finite:
        # Decoding as a deployment does, after the last position's logits alone or in the runtime's own loop, is another
        # way through the cache; the worse of the two is what counts, as long as the tokens are the same.
        agreed = np.logical_and.accumulate(free == teacher, axis=1)[:, :-1, None]
        deployed = got.copy()
        deployed[:, width:] = np.where(agreed, own, got[:, width:])
        if not np.array_equal(deployed, got):
            statistics, worst = _worse((statistics, worst), _compare(wanted, deployed, case, margin))
    spread = np.abs(last.astype(np.float64) - got[:, width - 1]).max() if statistics and finite else None
    departures = []
    equal_tokens = teacher.size
    for row in range(len(teacher)):
        if (teacher[row] == free[row]).all():
            continue
        first = int((teacher[row] != free[row]).argmax())
        equal_tokens += first - teacher.shape[1]
        second, best = np.partition(wanted[row, width - 1 + first].astype(np.float64), -2)[-2:]
        if statistics:
            departures.append({"row": row, "token": first, "margin": float(best - second)})
    record = {
        "name": case.name,
        "passed": False,
        "positions": int(_valid(case, wanted.shape[1]).sum()),
        "statistics": statistics or None,
        "worst": worst,
        "last_position_max_abs": None if spread is None else float(spread),
        "greedy": {"tokens": int(teacher.size), "equal_tokens": equal_tokens, "departures": departures},
    }
    return record, noise


def _greedy(reference: _Side, case: PromptCase, steps: int) -> tuple[Logits, NDArray[np.int64]]:
    """Logits (batch, seq + steps, vocab) and the greedy tokens (batch, steps + 1) the reference chose on the way."""
    prompt = reference.prefill(case)
    logits, tokens = [prompt], [prompt[:, -1].argmax(-1)]
    for _ in range(steps):
        step = reference.decode(case, tokens[-1])
        logits.append(step[:, None])
        tokens.append(step.argmax(-1))
    return np.concatenate(logits, axis=1), np.stack(tokens, axis=1).astype(np.int64)


def _forced(side: _Side, case: PromptCase, teacher: NDArray[np.int64]) -> Logits:
    prompt = side.prefill(case)
    steps = [side.decode(case, teacher[:, step])[:, None] for step in range(teacher.shape[1] - 1)]
    return np.concatenate([prompt, *steps], axis=1)


def _free_run(side: _Side, case: PromptCase, last: Logits, steps: int) -> tuple[NDArray[np.int64], bool, Logits]:
    """Greedy tokens (batch, steps + 1), whether every logit was finite, and those of the steps (batch, steps, vocab).

    A runner with ``greedy(steps)`` has a decode loop of its own, as servers do: (batch, steps) tokens it picked after
    the last prefill, and the logits (batch, steps, vocab) it picked them from.
    """
    loop = getattr(side.runner, "greedy", None)
    if loop is not None:
        picked, logits = loop(steps + 1)
        return np.asarray(picked, dtype=np.int64), bool(np.isfinite(logits).all()), logits[:, 1:]
    tokens, each = [last.argmax(-1)], []
    for _ in range(steps):
        each.append(side.decode(case, tokens[-1]))
        tokens.append(each[-1].argmax(-1))
    finite = bool(np.isfinite(last).all()) and all(bool(np.isfinite(logits).all()) for logits in each)
    decoded = np.stack(each, axis=1) if each else np.empty((len(last), 0, last.shape[-1]), dtype=last.dtype)
    return np.stack(tokens, axis=1).astype(np.int64), finite, decoded


def _worse(
    one: tuple[dict[str, Any], dict[str, Any]], other: tuple[dict[str, Any], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of two sets of statistics over the same positions each one's worse value, and the place of the worse logit."""
    if not one[0] or not other[0]:
        return one if not one[0] else other  # a logit that is not finite is worse than any number
    statistics = dict(one[0])
    for name, value in other[0].items():
        if value is None or statistics[name] is None:
            continue
        pick = min if name.startswith(("cosine", "top1")) else max
        statistics[name] = pick(statistics[name], value)
    return statistics, max(one[1], other[1], key=lambda place: place["max_abs"])


def _valid(case: PromptCase, length: int) -> NDArray[np.bool_]:
    """Which positions of (batch, length) hold a token and not padding."""
    mask = np.ones((len(case.input_ids), length), dtype=bool)
    mask[:, : case.input_ids.shape[1]] = case.attention_mask == 1
    return mask


def _compare(wanted: Logits, got: Logits, case: PromptCase, margin: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Statistics over all valid positions, and the worst; no statistics when a logit is not finite."""
    where = np.argwhere(_valid(case, wanted.shape[1]))
    kl, cosine, max_abs, gaps = (np.empty(len(where)) for _ in range(4))
    agree = np.empty(len(where), dtype=bool)
    for start in range(0, len(where), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        rows, columns = where[part].T
        x, y = wanted[rows, columns].astype(np.float64), got[rows, columns].astype(np.float64)
        fault = distances.first_not_finite(x, y)
        if fault is not None:
            side, position, token = fault
            return {}, {**_place(case, where[start + position]), "token": token, "not_finite": side}
        kl[part] = distances.kl_divergence(x, y)
        cosine[part] = distances.cosine(x, y)
        max_abs[part] = distances.largest_difference(x, y)
        gaps[part] = distances.margins(x)
        agree[part] = distances.same_choice(x, y)
    worst = int(max_abs.argmax())
    row, column = where[worst]
    statistics = {
        "max_abs": float(max_abs.max()),
        "max_abs_median": float(np.median(max_abs)),
        **distances.kl_statistics(kl),
        "cosine_min": float(cosine.min()),
        **distances.choice_statistics(gaps, agree, margin),
    }
    token = int(np.abs(wanted[row, column] - got[row, column]).argmax())
    place = {**_place(case, where[worst]), "token": token}
    return statistics, {**place, "max_abs": float(max_abs[worst]), "kl": float(kl[worst])}


def _place(case: PromptCase, where: NDArray[np.int64]) -> dict[str, Any]:
    row, column = (int(index) for index in where)
    width = case.input_ids.shape[1]
    if column < width:
        return {"row": row, "phase": "prefill", "position": column}
    return {"row": row, "phase": "decode", "position": column - width}
