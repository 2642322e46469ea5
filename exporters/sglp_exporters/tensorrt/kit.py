"""What TensorRT is given: the graph, the ranges its sizes may take, and the script that builds it, as one folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglp_deploy import _io
from sglp_deploy.artifact import ExportArtifact, TensorSpec
from sglp_deploy.errors import BackendError, ConfigError
from sglp_exporters.onnx.runner import MODEL_FILE
from sglp_exporters.tensorrt import build

NETWORK_FILE = "network.onnx"
PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"

Range = tuple[int, int, int]  # least, what TensorRT tunes for, greatest

MAX_BATCH = 8
MAX_PROMPT = 1024
MAX_TOTAL = 2048
_TYPICAL_TOKENS = 128
# 16 kHz sound: a fifth of a second (speech models need about 400 samples for a frame), 5 and 20 seconds.
_SAMPLES: Range = (3_200, 80_000, 320_000)


def size_ranges(
    artifact: ExportArtifact, *, max_batch: int, max_prompt: int, max_total: int, sizes: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Range]]:
    """The range of every symbolic size of the graph's inputs, for each way the engine is run.

    A decoder gets two profiles, because TensorRT picks kernels for the typical size and a prompt and one token have
    nothing in common: "prefill" (many new tokens) and "decode" (one new token on a cache).  Greatest sizes agree with
    each other (the cache and the new tokens make the total), or the builder finds shapes that do not fit.

    Args:
        artifact: An ``onnx`` artifact.
        max_batch: Most rows; see :func:`check_limits`.
        max_prompt: Most tokens of one run.
        max_total: Most tokens of prompt and answer together.
        sizes: Ranges of sizes by name that replace these, in every profile that has the size.

    Raises:
        ConfigError: If a range is out of order, or a size has none.
    """
    symbols = {size for spec in artifact.inputs for size in spec.shape if isinstance(size, str)}
    batch = (1, 1, max_batch)
    profiles: dict[str, dict[str, Range]]
    if "past_sequence" in symbols:
        prompt = min(_TYPICAL_TOKENS, max_prompt)
        total = max(2, max_total // 2)
        profiles = {
            PREFILL: {
                "batch": batch,
                "sequence": (1, prompt, max_prompt),
                "past_sequence": (0, 0, max_total - max_prompt),
                "total_sequence": (1, prompt, max_total),
                "kept_logits": (1, 1, max_prompt),
            },
            DECODE: {
                "batch": batch,
                "sequence": (1, 1, 1),
                "past_sequence": (0, total - 1, max_total - 1),
                "total_sequence": (1, total, max_total),
                "kept_logits": (1, 1, 1),
            },
        }
    else:
        tokens = (1, min(_TYPICAL_TOKENS, max_prompt), max_prompt)
        profiles = {
            FORWARD: {"batch": batch, "sequence": tokens, "decoder_sequence": tokens, "samples": _SAMPLES},
        }
    given = {name: _range(name, values) for name, values in sizes.items()}
    if unknown := sorted(set(given) - symbols):
        raise ConfigError(
            f"sizes names {', '.join(unknown)}; the graph's sizes are {', '.join(sorted(symbols))}; name one of those"
        )
    found = {
        profile: {name: given.get(name, ranges.get(name)) for name in sorted(symbols)}
        for profile, ranges in profiles.items()
    }
    if missing := sorted({name for ranges in found.values() for name, value in ranges.items() if value is None}):
        raise ConfigError(
            f"nothing is known of the size {missing[0]}; TensorRT needs its least, typical and greatest value; pass "
            f"sizes={{{missing[0]!r}: (1, 8, 64)}}"
        )
    return {
        profile: {name: value for name, value in ranges.items() if value is not None}
        for profile, ranges in found.items()
    }


def check_limits(max_batch: int, max_prompt: int, max_total: int) -> None:
    """Refuse greatest sizes that make no sense.

    Raises:
        ConfigError: If one is not a positive whole number, or a prompt may be longer than prompt and answer.
    """
    for name, value in (("max_batch", max_batch), ("max_prompt", max_prompt), ("max_total", max_total)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} is not a positive whole number; an engine's greatest sizes are fixed")
    if max_total < max_prompt:
        raise ConfigError(
            f"max_total={max_total} is below max_prompt={max_prompt}; it counts prompt and answer; pass a greater one"
        )


def _range(name: str, values: Sequence[int]) -> Range:
    if len(values) != 3 or not 0 <= values[0] <= values[1] <= values[2]:
        raise ConfigError(f"sizes[{name!r}]={tuple(values)} is not (least, typical, greatest) in order; correct it")
    return (values[0], values[1], values[2])


def write_kit(
    artifact: ExportArtifact, folder: Path, *, targets: Sequence[str], ranges: Mapping[str, Mapping[str, Range]]
) -> dict[str, Any]:
    """Make the folder of an ``onnx`` artifact a build kit: TensorRT's graph, the description, and the script.

    Args:
        artifact: The graph that lies in ``folder``.
        folder: Gets ``kit.json``, ``build.py`` and, where the graph has an optional input, ``network.onnx``.
        targets: From :func:`sglp_exporters.tensorrt.build.target_names`.
        ranges: From :func:`size_ranges`.

    Returns:
        The content of ``kit.json``.

    Raises:
        BackendError: If most of the graph's weights are not of the type the artifact says.
    """
    from sglp_exporters.onnx.passes import required_inputs

    check_weight_types(folder / MODEL_FILE, artifact.precision)
    network = MODEL_FILE
    if artifact.details.get("optional_inputs"):
        network = NETWORK_FILE
        (folder / network).write_bytes(required_inputs(folder / MODEL_FILE))
    files = [network, *(name for name in artifact.files if name.startswith(f"{MODEL_FILE}."))]
    kit = {
        "schema": build.KIT_SCHEMA,
        "network": network,
        "precision": artifact.precision,
        "weight_bytes": artifact.weight_bytes,
        "targets": list(targets),
        "inputs": [spec.to_json() for spec in artifact.inputs],
        "outputs": [spec.to_json() for spec in artifact.outputs],
        "profiles": [
            {"name": name, "shapes": {spec.name: _shapes(spec, sizes) for spec in artifact.inputs}}
            for name, sizes in ranges.items()
        ],
        "files": {
            name: {"sha256": _io.sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in files
        },
    }
    _io.write_json(folder / build.KIT_FILE, kit)
    # The module's own source: what is carried away is what is tested here.
    (folder / build.SCRIPT_FILE).write_text(inspect.getsource(build), encoding="utf-8")
    return kit


def check_weight_types(file: Path, precision: str) -> None:
    """Refuse a graph most of whose weights are not of the type it is called by: an engine takes types from the graph.

    Raises:
        BackendError: Saying which type they are.
    """
    import onnx

    types = onnx.TensorProto
    names = {types.FLOAT: "fp32", types.FLOAT16: "fp16", types.BFLOAT16: "bf16", types.INT8: "int8"}
    elements: dict[str, int] = {}
    for tensor in onnx.load(str(file), load_external_data=False).graph.initializer:
        if tensor.data_type in names:
            count = 1
            for size in tensor.dims:
                count *= size
            name = names[tensor.data_type]
            elements[name] = elements.get(name, 0) + count
    most = max(elements, key=lambda name: elements[name], default=precision)
    if most != precision:
        share = elements[most] / sum(elements.values())
        raise BackendError(
            f"{share:.0%} of the graph's weights are {most}, not {precision}; TensorRT takes precision from the graph, "
            "so the engine would be mislabelled; report this as a bug"
        )


def _shapes(spec: TensorSpec, sizes: Mapping[str, Range]) -> dict[str, list[int]]:
    return {
        part: [sizes[size][index] if isinstance(size, str) else size for size in spec.shape]
        for index, part in enumerate(("min", "opt", "max"))
    }
