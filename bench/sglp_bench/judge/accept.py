"""One verdict over quality, parity, speed and memory: the limits a user states, and which of them are met.

A limit is met when the worse end of the figure's 95 % interval meets it.  So a figure that only may be good enough is
not accepted.  A size or a peak of memory has no interval: the reading itself is judged.  What was not measured misses
its limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sglp_bench.metrics.decode import DECODE_LATENCY
from sglp_bench.metrics.prefill import PREFILL_LATENCY
from sglp_deploy.errors import ConfigError

Json = Mapping[str, Any]

PARITY: Final = "parity"
PASSED: Final = "passed"
TASKS: Final = "tasks"
_SPEEDS: Final = {"prefill": PREFILL_LATENCY.name, "decode": DECODE_LATENCY.name}
# The first of these that was read of both arms, as on the report's card.
_BYTES: Final = {
    "memory": ("device_allocated_peak", "device_process_used", "host_peak"),
    "size": ("artifact_bytes",),
}
_RATIO: Final = re.compile(r"(\d+(?:\.\d+)?)x")
_NUMBER: Final = re.compile(r"[+-]?\d+(?:\.\d+)?")
_BASELINE: Final = "-baseline"


@dataclass(frozen=True)
class Finding:
    """One limit and what was found.

    Attributes:
        name: What is limited, with the artifact where there may be several: "decode (onnx)".
        limit: "at least 1.1x".
        value: The figure, in the limit's unit; None where it was not measured or has none.
        interval: Its 95 % interval; None where it has none.
        met: Whether it is good enough.
        sentence: All of it in words.
    """

    name: str
    limit: str
    value: float | None
    interval: tuple[float, float] | None
    met: bool
    sentence: str


@dataclass(frozen=True)
class _Limit:
    """Bound of a figure; ``ratio`` says whether it is one to the unpruned model's, else a difference from it."""

    bound: float
    ratio: bool
    at_least: bool

    @property
    def words(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.figure(self.bound)}"

    def figure(self, value: float) -> str:
        return f"{value:.4g}x" if self.ratio else f"{value:+.4g}"


def check_limits(limits: Json) -> list[str]:
    """What is wrong with limits as a user writes them; empty when nothing is.

    Args:
        limits: ``{"perplexity": "1.5x", "decode": "1.1x", "parity": "passed", "tasks": {"piqa": "-0.03"}}``.
    """
    faults = []
    for name, text in limits.items():
        for place, given in text.items() if name == TASKS else [("", text)]:
            if name != PARITY:
                try:
                    _limit(name, given, at_least=True)
                except ConfigError as error:
                    faults += [f"[accept{f'.{TASKS}] {place}' if place else f'] {name}'} = {error}"]
    return faults


def verdict(limits: Json, report: Json) -> dict[str, Any]:
    """Whether what a report holds is accepted: ``{"accepted": bool, "findings": [...]}``; see :class:`Finding`.

    Args:
        limits: As for :func:`check_limits`.
        report: Content of ``report.json``: its ``quality``, ``artifacts``, ``parity`` and ``measurements``.
    """
    quality = report.get("quality") or {}
    # The same depth on both sides compares two runtimes, of which no limit speaks.
    compared = [item for item in report["measurements"] if item["kind"] == "depth"]
    left = _not_compared(report, [item["name"] for item in compared])
    findings: list[Finding] = []
    for name, text in limits.items():
        if name == "perplexity":
            limit = _limit(name, text, at_least=False)
            findings.append(_judged(name, limit, quality.get("ratio"), quality.get("ratio_interval"), "not evaluated"))
        elif name == PARITY:
            findings.append(_parity(report["parity"]))
        elif name == TASKS:
            findings += [_task(task, given, (quality.get("tasks") or {}).get(task)) for task, given in text.items()]
        else:
            find, limit = _speed if name in _SPEEDS else _bytes, _limit(name, text, at_least=name in _SPEEDS)
            findings += [find(name, text, item) for item in compared]
            findings += [_missed(f"{name} ({artifact})", limit, why) for artifact, why in left.items()]
            if not compared and not left:
                findings.append(_missed(name, limit, "no artifact was compared with its unpruned baseline"))
    return {"accepted": all(found.met for found in findings), "findings": [asdict(found) for found in findings]}


def missed(verdict: Json) -> list[str]:
    """The sentences of limits that are not met."""
    return [found["sentence"] for found in verdict["findings"] if not found["met"]]


def _limit(name: str, text: Any, *, at_least: bool) -> _Limit:
    """Read ``text``; the fault is worded to stand behind the limit's name and an equals sign."""
    if isinstance(text, str) and (found := _RATIO.fullmatch(text)) and float(found[1]) > 0:
        return _Limit(float(found[1]), True, at_least)
    if name == TASKS and isinstance(text, str) and _NUMBER.fullmatch(text):
        return _Limit(float(text), False, at_least)
    more = ' or a difference from it ("-0.03")' if name == TASKS else ""
    raise ConfigError(
        f'{text!r} is no limit; a multiple of the unpruned model\'s figure is read ("1.5x"){more}; write it so'
    )


def _not_compared(report: Json, compared: Sequence[str]) -> dict[str, str]:
    """Why each artifact that a baseline was made for was not compared with it; it was to be, or there were none."""
    failed = {item.get("name") for item in report["parity"] if item.get("passed") is not True}
    names = [str(item["name"]) for item in report["artifacts"]]
    found = {}
    for name in (name.removesuffix(_BASELINE) for name in names if name.endswith(_BASELINE)):
        if name not in compared:
            bad = next((arm for arm in (name, f"{name}{_BASELINE}") if arm in failed), None)
            found[name] = f"parity of {bad} failed, so it was not measured" if bad else "it was not measured"
    return found


def _speed(name: str, text: str, item: Json) -> Finding:
    limit, label = _limit(name, text, at_least=True), f"{name} ({item['name']})"
    row: Json = next((row for row in item["rows"] if row["metric"] == _SPEEDS[name]), {})
    if unverified := item.get("unverified"):
        return _missed(label, limit, unverified[0])
    found = _judged(label, limit, row.get("ratio"), row.get("interval"), "this metric was not measured")
    if found.met and limit.bound > 1 and row.get("resolved") is False:
        return _missed(label, limit, "the difference is within the noise floor of the A/A control", row.get("ratio"))
    if found.value is not None and found.interval is None:
        return _missed(label, limit, "one pair of blocks gives no interval", row.get("ratio"))
    return found


def _bytes(name: str, text: str, item: Json) -> Finding:
    limit, label = _limit(name, text, at_least=False), f"{name} ({item['name']})"
    ladder = {row["rung"]: row["arms"] for row in item["memory"] if len(row["arms"]) == 2}
    arms: Sequence[Json] = next((ladder[rung] for rung in _BYTES[name] if rung in ladder), ())
    ratio = arms[1]["bytes"] / arms[0]["bytes"] if arms and arms[0]["bytes"] else None
    return _judged(label, limit, ratio, None, "it was not read of both models")


def _parity(certificates: Sequence[Json]) -> Finding:
    failed = [str(item.get("name")) for item in certificates if item.get("passed") is not True]
    met = bool(certificates) and not failed
    why = f"failed: {', '.join(failed)}" if failed else PASSED if met else "no artifact was checked"
    return Finding(PARITY, PASSED, None, None, met, f"{PARITY}: {PASSED} is asked; {why}")


def _task(name: str, text: str, task: Json | None) -> Finding:
    metric: Json = task["metrics"][task["metric"]] if task else {}
    limit = _limit(TASKS, text, at_least=metric.get("higher_is_better", True))
    kind = "ratio" if limit.ratio else "difference"
    return _judged(name, limit, metric.get(kind), metric.get(f"{kind}_interval"), "this task was not asked")


def _judged(
    name: str, limit: _Limit, value: float | None, interval: Sequence[float] | None, unmeasured: str
) -> Finding:
    if value is None:
        return _missed(name, limit, unmeasured)
    end = value if interval is None else interval[0 if limit.at_least else 1]
    met = end >= limit.bound if limit.at_least else end <= limit.bound
    words = f"{name}: {limit.words} is asked; it is {limit.figure(value)}"
    if interval is not None:
        words += f", and the {'lower' if limit.at_least else 'upper'} end of its 95 % interval is {limit.figure(end)}"
    span = None if interval is None else (float(interval[0]), float(interval[1]))
    return Finding(name, limit.words, float(value), span, met, words)


def _missed(name: str, limit: _Limit, why: str, value: float | None = None) -> Finding:
    return Finding(name, limit.words, value, None, False, f"{name}: {limit.words} is asked; not accepted: {why}")
