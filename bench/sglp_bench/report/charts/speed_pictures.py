"""The measurements as inline SVG: raw latencies of both arms, ratios with their intervals, memory by probe.

The arms are told apart by place and label first and by colour second.  Nothing here computes a statistic that a claim
rests on.  Intervals, control and ceiling come from the comparison file and are only drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from sglp_bench.report import wording as fmt
from sglp_bench.report.charts.axes import Scale, linear_ticks
from sglp_bench.report.charts.drawing import Drawing

_DOTS_PER_ARM = 360  # more dots than this only darken the picture; every sample stays in the file
_ROLES = ("baseline", "control", "candidate")


def latency_strips(arms: Sequence[Mapping[str, Any]], width: float, *, key: str, metric: str) -> str:
    """Every arm's raw samples: a lane of dots per block with its median, and a box of the pooled quartiles.

    Args:
        arms: ``{"label", "role", "blocks"}`` each; blocks hold samples in seconds, warm-ups apart; the role is
            "baseline", "control" or "candidate".
        width: Width of the drawing.
        key: Unique in the page.
        metric: What was timed, for the title.
    """
    pooled = [[sample for block in arm["blocks"] for sample in block] for arm in arms]
    everything = sorted(sample for samples in pooled for sample in samples)
    low, high = everything[0], everything[-1]
    # One stalled call must not squeeze every other sample into a line: the axis ends beyond the bulk, and says so.
    bulk = everything[max(0, math.ceil(len(everything) * 0.985) - 1)]
    if high - low > 2.5 * (bulk - low) and bulk > low:
        high = low + 1.25 * (bulk - low)
    pad = (high - low) * 0.04 or high * 0.05 or 1e-9
    low, high = low - pad, high + pad
    size, unit = fmt.seconds_unit(median(everything))
    lanes = max(len(arm["blocks"]) for arm in arms)
    lane = min(9.0, max(3.0, 56.0 / lanes))
    row = lanes * lane + 58
    left, top, right = 10.0, 8.0, 10.0
    height = top + row * len(arms) + 42
    medians = [median(samples) for samples in pooled]
    drawing = Drawing(
        width,
        height,
        key=key,
        title=f"Latency of {metric} in each arm",
        description="; ".join(
            f"{arm['label']}: median {fmt.seconds(middle)} over {len(samples)} samples in {len(arm['blocks'])} blocks"
            for arm, samples, middle in zip(arms, pooled, medians, strict=True)
        ),
    )
    x_of = Scale(low, high, left, width - right)
    floor = top + row * len(arms)
    for tick in linear_ticks(low / size, high / size, 6 if width > 500 else 4):
        drawing.line(x_of(tick * size), top, x_of(tick * size), floor, "grid")
        drawing.text(x_of(tick * size), floor + 17, f"{tick:.6g}", anchor="middle")
    drawing.line(left, floor, width - right, floor, "axis")
    drawing.text((left + width) / 2, floor + 36, f"{metric}, {unit} (lower is better)", anchor="middle")
    for index, (arm, samples) in enumerate(zip(arms, pooled, strict=True)):
        kind, y = _kind(arm["role"]), top + row * index
        drawing.text(left, y + 13, f"{arm['label']}", "label strong")
        drawing.text(width - right, y + 13, f"median {fmt.seconds(medians[index])}", anchor="end")
        stride = max(1, math.ceil(len(samples) / _DOTS_PER_ARM))
        seen = 0
        for number, block in enumerate(arm["blocks"]):
            at = y + 26 + number * lane
            for value in block:
                seen += 1
                if seen % stride == 0:
                    drawing.add("circle", cx=x_of(value), cy=at, r=min(2.4, lane * 0.36), class_=f"sample {kind}")
            middle = median(block) if block else None
            if middle is not None:
                tip = f"block {number + 1}: median {fmt.seconds(middle)} of {len(block)}"
                drawing.add(
                    "rect",
                    tip=tip,
                    x=x_of(middle) - 1.25,
                    y=at - lane / 2,
                    width=2.5,
                    height=lane,
                    class_="block-median",
                )
        _box(drawing, samples, y + 26 + lanes * lane + 10, kind, x_of)
        beyond = sum(value > high for value in samples)
        if beyond:
            note = f"{beyond} sample{'s' if beyond > 1 else ''} beyond, up to {fmt.seconds(max(samples))} →"
            drawing.text(width - right, y + 26 + lanes * lane + 27, note, "label faint", "end")
    return drawing.render()


def _kind(role: str) -> str:
    return f"arm-{role if role in _ROLES else 'candidate'}"


def _box(drawing: Drawing, samples: Sequence[float], y: float, kind: str, x_of: Scale) -> None:
    if len(samples) < 4:
        return
    first, middle, third = quantiles(samples, n=4, method="inclusive")
    reach = 1.5 * (third - first)
    inside = [value for value in samples if first - reach <= value <= third + reach]
    drawing.line(x_of(min(inside)), y, x_of(max(inside)), y, f"whisker {kind}")
    tip = f"middle half: {fmt.seconds(first)} to {fmt.seconds(third)}, median {fmt.seconds(middle)}"
    drawing.add(
        "rect", tip=tip, x=x_of(first), y=y - 6, width=max(x_of(third) - x_of(first), 1), height=12, rx=2,
        class_=f"box {kind}",
    )  # fmt: skip
    drawing.line(x_of(middle), y - 8, x_of(middle), y + 8, "box-median")


def forest(rows: Sequence[Mapping[str, Any]], width: float, *, key: str) -> str:
    """A row per metric: ratio and interval, the 1.0 line, the band of the A/A control and a tick at the ceiling.

    Args:
        rows: ``label, ratio, low, high`` and, where known, ``control_low, control_high, ceiling, resolved, note``.
        width: Width of the drawing; below 600 the note goes under its label.
        key: Unique in the page.
    """
    narrow = width < 600
    marks = [1.0]
    for row in rows:
        marks += [
            row[name]
            for name in ("ratio", "low", "high", "control_low", "control_high", "ceiling")
            if (row.get(name) or 0) > 0
        ]
    # Logarithmic, because 2x faster and 2x slower are equally far from no difference.
    pad = max((max(marks) / min(marks)) ** 0.07, 1.01)
    low, high = min(marks) / pad, max(marks) * pad
    left, right = (8.0, 8.0) if narrow else (156.0, 236.0)
    pitch = 88.0 if narrow else 46.0
    top = 24.0
    floor = top + pitch * len(rows)
    drawing = Drawing(
        width,
        floor + 44,
        key=key,
        title="Speed relative to the baseline",
        description="; ".join(
            f"{row['label']}: {fmt.ratio(row['ratio'])}, interval {fmt.interval(row['low'], row['high'])}"
            for row in rows
        ),
    )
    x_of = Scale(low, high, left, width - right, log=True)
    for index in range(0, len(rows), 2):
        drawing.add("rect", x=0, y=top + index * pitch, width=width, height=pitch, rx=5, class_="ground")
    ticks = linear_ticks(low, high, 4 if narrow else 6) if high / low < 3 else x_of.ticks()
    # On a phone the words stand above the marks, so the lines run only where the marks are.
    bands = [(top + index * pitch + 46, top + (index + 1) * pitch - 8) for index in range(len(rows))]
    for begin, end in bands if narrow else [(top, floor)]:
        for tick in ticks:
            drawing.line(x_of(tick), begin, x_of(tick), end, "grid")
        drawing.line(x_of(1), begin - 2, x_of(1), end, "one")
    for tick in ticks:
        drawing.text(x_of(tick), floor + 17, f"{tick:.4g}×", anchor="middle")
    if not narrow:
        drawing.text(x_of(1), top - 9, "no difference", anchor="middle")
    drawing.line(left, floor, width - right, floor, "axis")
    scale = "times as fast as the baseline; 1 is no difference"
    drawing.text(left + (width - left - right) / 2, floor + 36, scale, anchor="middle")
    for index, row in enumerate(rows):
        start = top + index * pitch
        y = start + (62 if narrow else pitch / 2)
        numbers = f"{fmt.ratio(row['ratio'])}  [{fmt.interval(row['low'], row['high'])}]"
        verdict, unit = row.get("note", ""), row.get("sub", "")
        if narrow:  # the verdict, which may be long, stands beside the metric's name, which is short
            drawing.text(8, start + 19, row["label"], "label strong")
            drawing.text(width - 8, start + 19, verdict, anchor="end")
            drawing.text(8, start + 37, numbers)
            drawing.text(width - 8, start + 37, unit, "label faint", "end")
        else:
            drawing.text(8, y - 3, row["label"], "label strong")
            drawing.text(8, y + 13, unit, "label faint")
            drawing.text(width - right + 14, y - 3, numbers, "label strong")
            drawing.text(width - right + 14, y + 13, verdict)
        _forest_marks(drawing, row, y, x_of)
    return drawing.render()


def _forest_marks(drawing: Drawing, row: Mapping[str, Any], y: float, x_of: Scale) -> None:
    if row.get("control_low") and row.get("control_high"):
        tip = f"A/A control: {fmt.interval(row['control_low'], row['control_high'])}"
        x1, x2 = x_of(row["control_low"]), x_of(row["control_high"])
        drawing.add("rect", tip=tip, x=x1, y=y - 14, width=max(x2 - x1, 1.5), height=28, class_="control")
    if row.get("ceiling"):
        x = x_of(row["ceiling"])
        drawing.line(x, y - 14, x, y + 14, "ceiling")
        drawing.add(
            "path",
            tip=f"ceiling {fmt.ratio(row['ceiling'])}",
            d=f"M{x - 4.5:.1f} {y - 18:.1f}h9l-4.5 6z",
            class_="ceiling-head",
        )
    x1, x2, x = x_of(row["low"]), x_of(row["high"]), x_of(row["ratio"])
    drawing.line(x1, y, x2, y, "interval")
    for end in (x1, x2):
        drawing.line(end, y - 6, end, y + 6, "interval")
    tip = f"{fmt.ratio(row['ratio'])} [{fmt.interval(row['low'], row['high'])}]"
    if row.get("resolved"):
        drawing.add("path", tip=tip, d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", class_="point")
    else:
        drawing.add("circle", tip=tip, cx=x, cy=y, r=5, class_="point-open")


def paired_bars(rows: Sequence[Mapping[str, Any]], width: float, *, key: str, title: str, kind: str) -> str:
    """Groups of horizontal bars from zero: one group per row, one bar per arm, the value written at the end.

    Args:
        rows: ``{"label", "sub", "note", "bars": [(role, arm label, value)]}``; all values in one unit.
        width: Width of the drawing.
        key: Unique in the page.
        title: What is compared.
        kind: "bytes" or "number", how a value is written.
    """
    write = fmt.size_bytes if kind == "bytes" else fmt.significant
    left, thick = 96.0, 16.0
    high = max((value for row in rows for _, _, value in row["bars"]), default=0.0) or 1.0
    room = width - left - 92
    heights = [(56 if row.get("sub") else 40) + (thick + 5) * len(row["bars"]) for row in rows]
    drawing = Drawing(
        width,
        sum(heights) + 4,
        key=key,
        title=title,
        description="; ".join(
            f"{row['label']}: " + ", ".join(f"{arm} {write(value)}" for _, arm, value in row["bars"]) for row in rows
        ),
    )
    y = 4.0
    for row, tall in zip(rows, heights, strict=True):
        drawing.text(0, y + 15, row["label"], "label strong")
        if row.get("note"):
            drawing.text(width, y + 15, row["note"], "label strong", "end")
        if row.get("sub"):
            drawing.text(0, y + 31, row["sub"], "label faint")
        at = y + (40 if row.get("sub") else 24)
        for role, arm, value in row["bars"]:
            drawing.text(left - 8, at + 12, arm if len(arm) <= 14 else f"{arm[:13]}…", anchor="end")
            length = max(value / high * room, 1)
            drawing.add(
                "rect", tip=f"{arm}: {write(value)}", x=left, y=at, width=length, height=thick, rx=3,
                class_=f"flat {_kind(role)}",
            )  # fmt: skip
            drawing.text(left + length + 7, at + 12, write(value))
            at += thick + 5
        drawing.line(left, at - 5 - (thick + 5) * len(row["bars"]) + 2, left, at - 2, "axis")
        y += tall
    return drawing.render()
