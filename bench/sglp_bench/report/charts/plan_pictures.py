"""The plan as inline SVG: similarity, importance, segmentation and which layers went."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sglp_bench.report import wording as fmt
from sglp_bench.report.charts.axes import Scale, linear_ticks, upright_axis
from sglp_bench.report.charts.drawing import Drawing, attribute

# Viridis: perceptually even and readable with every common colour deficiency (van der Walt and Smith, 2015).
_RAMP = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
_SINGLE_CELLS = 40  # up to this many layers each cell carries its value as a tooltip
_LOG_RANGE = 30.0  # a bar below a thirtieth of the axis cannot be told from nothing


def ramp(position: float) -> str:
    """The colour at ``position`` in [0, 1] of the sequential ramp."""
    place = min(max(position, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    low, high = _RAMP[index], _RAMP[index + 1]
    mixed = (
        round(int(low[i : i + 2], 16) * (1 - place + index) + int(high[i : i + 2], 16) * (place - index))
        for i in (1, 3, 5)
    )
    return "#" + "".join(f"{value:02x}" for value in mixed)


def heat_map(
    values: Sequence[Sequence[float]], segments: Sequence[Sequence[int]], drop: Sequence[int], *, key: str
) -> str:
    """Similarity between layers, (L, L), with the segments outlined and the removed layers hatched on both axes."""
    n_layers = len(values)
    removed = set(drop)
    left, top, side, strip = 46.0, 6.0, 440.0, 10.0
    cell = side / n_layers
    flat = [value for row in values for value in row]
    low, high = math.floor(min(flat) * 20) / 20, math.ceil(max(flat) * 20) / 20
    span = high - low or 1.0
    drawing = Drawing(
        left + side + 6,
        top + side + 88,
        key=key,
        title="Similarity between layers",
        description=f"Linear CKA between the outputs of {n_layers} layers, from {min(flat):.2f} to {max(flat):.2f}; "
        f"{len(segments)} segments are outlined; {len(removed)} removed layers are hatched on the axes.",
    )
    if n_layers <= _SINGLE_CELLS:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                drawing.add(
                    "rect",
                    tip=f"layers {i} and {j}: {value:.3f}",
                    x=left + j * cell,
                    y=top + i * cell,
                    width=cell + 0.25,  # a hair of overlap: no seams between neighbours when scaled
                    height=cell + 0.25,
                    fill=ramp((value - low) / span),
                )
    else:
        paths: dict[str, list[str]] = {}
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = ramp(round((value - low) / span * 63) / 63)
                x, y = attribute(left + j * cell), attribute(top + i * cell)
                paths.setdefault(colour, []).append(f"M{x} {y}h{cell + 0.25:.2f}v{cell + 0.25:.2f}h-{cell + 0.25:.2f}z")
        for colour, pieces in paths.items():
            drawing.add("path", d="".join(pieces), fill=colour)
    for layer in range(n_layers):
        look = {"fill": drawing.hatch} if layer in removed else {"class_": "kept-mark"}
        tip, at = _fate(layer, removed), layer * cell
        drawing.add("rect", tip=tip, x=left - strip - 3, y=top + at, width=strip, height=max(cell - 1, 0.8), **look)
        drawing.add("rect", tip=tip, x=left + at, y=top + side + 3, width=max(cell - 1, 0.8), height=strip, **look)
        if layer % (5 if n_layers <= 50 else 10) == 0:
            drawing.text(left - strip - 8, top + at + cell / 2 + 4, str(layer), anchor="end")
            drawing.text(left + at + cell / 2, top + side + strip + 17, str(layer), anchor="middle")
    for start, end in segments:
        at, size = start * cell, (end - start) * cell
        for kind in ("segment-halo", "segment-line"):
            drawing.add("rect", x=left + at, y=top + at, width=size, height=size, class_=kind)
    _ramp_legend(drawing, left, top + side + strip + 34, side, low, high)
    return drawing.render()


def _ramp_legend(drawing: Drawing, x: float, y: float, width: float, low: float, high: float) -> None:
    steps = 48
    bar = width * 0.5
    for step in range(steps):
        drawing.add(
            "rect", x=x + step * bar / steps, y=y, width=bar / steps + 0.3, height=10, fill=ramp(step / (steps - 1))
        )
    for tick in linear_ticks(low, high, 4):
        at = x + (tick - low) / ((high - low) or 1) * bar
        drawing.line(at, y + 10, at, y + 14, "axis")
        drawing.text(at, y + 26, f"{tick:.2f}".rstrip("0").rstrip("."), anchor="middle")
    drawing.text(x + bar + 14, y + 9, "CKA", "label strong")
    drawing.add("rect", x=x + bar + 58, y=y, width=12, height=10, fill=drawing.hatch)
    drawing.text(x + bar + 75, y + 9, "removed")
    drawing.add("rect", x=x + bar + 58.75, y=y + 17.75, width=10.5, height=8.5, class_="segment-key")
    drawing.text(x + bar + 75, y + 26, "segment")


def _fate(layer: int, removed: set[int]) -> str:
    return f"layer {layer}: {'removed' if layer in removed else 'kept'}"


def _bar_look(drawing: Drawing, gone: bool, kept: str) -> dict[str, str]:
    """A removed layer is hatched and outlined; one that stays has the class ``kept``."""
    return {"fill": drawing.hatch, "class_": "gone"} if gone else {"class_": kept}


def layer_strip(
    n_layers: int, drop: Sequence[int], segments: Sequence[Sequence[int]], width: float, *, key: str
) -> str:
    """The stack from first to last layer in one row: kept solid, removed hatched and crossed, segments bracketed."""
    removed = set(drop)
    drawing = Drawing(
        width,
        62 if segments else 40,
        key=key,
        title="Layers kept and removed",
        description=f"{n_layers} layers in order; removed: {fmt.words([str(i) for i in sorted(removed)]) or 'none'}.",
    )
    gap = min(6.0, width / n_layers * 0.35) if segments else 0.0
    starts = [segment[0] for segment in segments][1:]
    pitch = (width - 2 - gap * len(starts)) / n_layers
    place = [1 + layer * pitch + gap * sum(start <= layer for start in starts) for layer in range(n_layers)]
    for layer, x in enumerate(place):
        gone = layer in removed
        drawing.add(
            "rect", tip=_fate(layer, removed), x=x + 0.75, y=2, width=max(pitch - 1.5, 0.8), height=34,
            rx=min(4.0, pitch / 4), **_bar_look(drawing, gone, "kept"),
        )  # fmt: skip
        if pitch >= 20:
            drawing.text(x + pitch / 2, 23, str(layer), "cell gone-text" if gone else "cell", "middle")
    for index, (start, end) in enumerate(segments):
        x1, x2 = place[start] + 1, place[end - 1] + pitch - 1
        drawing.add("path", d=f"M{x1:.1f} 41v4H{x2:.1f}v-4", class_="bracket")
        drawing.text((x1 + x2) / 2, 58, f"S{index + 1}", anchor="middle")
    return drawing.render()


def importance_bars(
    values: Sequence[float | None],
    drop: Sequence[int],
    segments: Sequence[Sequence[int]],
    criterion: str,
    width: float,
    *,
    key: str,
) -> str:
    """One bar per layer in segment groups; removed bars are hatched and crossed; a log axis when the range asks."""
    known = [value for value in values if value is not None]
    removed = set(drop)
    low, high = min(known, default=0.0), max(known, default=1.0)
    log = low > 0 and high / low > _LOG_RANGE
    floor = low / 1.6 if log else min(0.0, low)
    ceiling = high * 1.35 if log else (high + 0.06 * (high - floor) if high > 0 else 0.0)
    if ceiling <= floor:
        ceiling = floor + 1
    left, top, bottom, height = 52.0, 30.0, 26.0, 300.0
    drawing = Drawing(
        width,
        height,
        key=key,
        title=f"Importance of each layer by {criterion}",
        description=f"{len(values)} bars from {fmt.significant(low)} to {fmt.significant(high)} on a "
        f"{'logarithmic' if log else 'linear'} axis; removed layers "
        f"{fmt.words([str(i) for i in sorted(removed)]) or 'none'} are hatched and crossed.",
    )

    y_of = Scale(floor, ceiling, height - bottom, top, log)
    ranges = [tuple(segment) for segment in segments] or [(0, len(values))]
    gap = 8.0 if len(ranges) > 1 and width > 500 else 4.0 if len(ranges) > 1 else 0.0
    pitch = (width - left - gap * len(ranges)) / len(values)
    every = 1 if pitch >= 19 else 5 if len(values) <= 50 else 10
    for index, (start, end) in enumerate(ranges):
        x = left + start * pitch + index * gap
        drawing.add(
            "rect", x=x, y=top - 4, width=(end - start) * pitch + gap - 3, height=height - bottom - top + 4, rx=4,
            class_="ground",
        )  # fmt: skip
        if len(ranges) > 1:
            drawing.text(x + ((end - start) * pitch + gap - 3) / 2, top - 10, f"S{index + 1}", anchor="middle")
    upright_axis(drawing, y_of, y_of.ticks(), left)
    base = y_of(floor if log else 0.0)
    for index, (start, end) in enumerate(ranges):
        for layer in range(start, end):
            x = left + layer * pitch + index * gap + gap / 2 - 1
            value, gone = values[layer], layer in removed
            if every == 1 or layer % every == 0:
                kind = "label gone-text" if gone else "label"
                drawing.text(x + pitch / 2, height - bottom + 17, str(layer), kind, "middle")
            if value is None:
                drawing.text(x + pitch / 2, base - 4, "?", anchor="middle")
                continue
            y = y_of(value)
            tip = f"layer {layer}: {fmt.significant(value, 4)}{', removed' if gone else ''}"
            drawing.add(
                "rect", tip=tip, x=x + pitch * 0.12, y=min(y, base), width=pitch * 0.76,
                height=max(abs(base - y), 1.0), rx=min(2.5, pitch / 6), **_bar_look(drawing, gone, "bar"),
            )  # fmt: skip
            if gone:
                drawing.text(x + pitch / 2, min(y, base) - 4, "×", "cross" if pitch >= 14 else "cross small", "middle")
    drawing.line(left, base, width, base, "axis")
    return drawing.render()


def loss_curve(losses: Sequence[float], chosen: int, width: float, *, key: str) -> str:
    """Segmentation loss for K = 1 to L with the chosen K ringed and labelled."""
    n_layers = len(losses)
    left, top, bottom, height = 44.0, 16.0, 44.0, 470.0 if width > 400 else 280.0
    high = max(losses) * 1.05 or 1.0
    drawing = Drawing(
        width,
        height,
        key=key,
        title="Segmentation loss by number of segments",
        description=f"The loss falls from {fmt.significant(losses[0])} at one segment to "
        f"{fmt.significant(losses[-1])} at {n_layers}; K = {chosen} was used.",
    )

    x_of = Scale(1, max(n_layers, 2), left + 10, width - 12)
    y_of = Scale(0, high, height - bottom, top)
    upright_axis(drawing, y_of, y_of.ticks(), left)
    for tick in sorted({1, *(round(value) for value in linear_ticks(1, n_layers, 6))}):
        drawing.text(x_of(tick), height - bottom + 17, str(tick), anchor="middle")
    drawing.text((left + width) / 2, height - 6, "K, number of segments", anchor="middle")
    points = [(x_of(index + 1), y_of(loss)) for index, loss in enumerate(losses)]
    drawing.add("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_="curve")
    for index, (x, y) in enumerate(points):
        tip = f"K = {index + 1}: loss {fmt.significant(losses[index], 4)}"
        drawing.add("circle", tip=tip, cx=x, cy=y, r=2.6, class_="dot")
    if 1 <= chosen <= n_layers:
        x, y = points[chosen - 1]
        drawing.line(x, y + 8, x, height - bottom, "drop-line")
        drawing.add("circle", cx=x, cy=y, r=6.5, class_="ring")
        right = x < left + (width - left) * 0.6
        label = f"K = {chosen}, loss {fmt.significant(losses[chosen - 1])}"
        drawing.text(
            x + (12 if right else -12), max(y - 10, top + 8), label, "label strong", "start" if right else "end"
        )
    drawing.line(left, height - bottom, width, height - bottom, "axis")
    return drawing.render()
