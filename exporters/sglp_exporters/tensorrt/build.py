"""Build a TensorRT engine from an ONNX file: one script for the exporter, for a build kit and for every TensorRT.

A build kit carries this file as ``build.py`` to the machine that has the target device.  So nothing may be imported
here but the standard library and TensorRT itself.  The exporter runs the same file as a program of its own.  A builder
that crashes, or that keeps gigabytes, does so in a process that ends.

    python build.py [--target sm_86,sm_89] [--out DIR] [--timing-cache FILE]

Length: 521 lines; it is carried as one file, so it cannot be cut.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import importlib.util
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KIT_FILE = "kit.json"
KIT_SCHEMA = "tensorrt-kit/1"  # history: 1 = first
REPORT_FILE = "build.json"
REPORT_SCHEMA = "tensorrt-build/1"  # history: 1 = first
ENGINE_FILE = "model.engine"
LAYERS_FILE = "layers.json"
SCRIPT_FILE = "build.py"

CLASSIC, RTX = "tensorrt", "tensorrt_rtx"  # import names; both packages have one interface
PORTABLE, CURRENT = "portable", "current"

# Devices by the name on the box.  Where a desktop and a laptop chip share a name they share the architecture too.
_DEVICES: Mapping[str, tuple[str, ...]] = {
    "sm_75": ("t4", "rtx-2060", "rtx-2070", "rtx-2080"),
    "sm_80": ("a100", "a30"),
    "sm_86": ("a10", "a40", "rtx-3050", "rtx-3060", "rtx-3070", "rtx-3080", "rtx-3090", "rtx-a4000", "rtx-a6000"),
    "sm_87": ("jetson-orin", "jetson-agx-orin", "jetson-orin-nx", "jetson-orin-nano"),
    "sm_89": ("l4", "l40", "l40s", "rtx-4050", "rtx-4060", "rtx-4070", "rtx-4080", "rtx-4090", "rtx-6000-ada"),
    "sm_90": ("h100", "h200", "gh200"),
    "sm_100": ("b200", "gb200"),
    "sm_103": ("b300", "gb300"),
    "sm_110": ("jetson-thor", "jetson-agx-thor"),
    "sm_120": ("rtx-5050", "rtx-5060", "rtx-5070", "rtx-5080", "rtx-5090", "rtx-pro-6000"),
    "sm_121": ("dgx-spark",),
}
# What TensorRT for RTX builds for; NVIDIA's support matrix has no data centre Hopper or Blackwell and no Jetson.
_RTX_CAPABILITIES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")

_ERROR_CODES = re.compile(r"\s*\(?In \w+ at /\S+:\d+.*$", re.DOTALL)
_MESSAGE = 400  # characters of TensorRT's own words that are repeated

# The code of a network takes 1.4 to 3.4 KiB for each of its layers and each profile (709 to 12,581 layers seen).
_CODE_BYTES_PER_LAYER = 4096
_CODE_BYTES = 1 << 20
_LEAST_WEIGHTS, _MOST_WEIGHTS = 0.9, 1.5  # engine without code over weights; a float32 engine of float16 weights has 2


class Refused(Exception):
    """What was asked for cannot be built; the message says what, why and what to do."""


def target_names(text: str | Sequence[str]) -> tuple[str, ...]:
    """Compute capabilities ("sm_86") for names of devices or capabilities, in order and without repetition.

    Args:
        text: "sm_86", "8.6", "RTX 4090", "jetson-orin", "portable" (any device since Ampere), "current" (the device
            in this machine), several of them separated by commas, or a sequence of them.

    Raises:
        Refused: If a name is unknown, or "portable" or "current" stands beside another.
    """
    asked = text.split(",") if isinstance(text, str) else list(text)
    names = tuple(dict.fromkeys(_target_name(one) for one in asked))
    if not names or (len(names) > 1 and {PORTABLE, CURRENT} & set(names)):
        raise Refused(
            f"target {','.join(names) or 'of no name'} cannot be built as one engine; {PORTABLE!r} and {CURRENT!r} "
            "stand alone; name one of them, or compute capabilities such as sm_86,sm_89"
        )
    return names


def _target_name(text: str) -> str:
    plain = re.sub(r"[\s_]+", "-", text.strip().lower())
    plain = re.sub(r"^(nvidia-|geforce-)+", "", plain)
    if plain in (PORTABLE, CURRENT):
        return plain
    number = re.fullmatch(r"(?:sm-?)?(\d{1,2})\.?(\d)", plain)
    if number and f"sm_{number[1]}{number[2]}" in _DEVICES:
        return f"sm_{number[1]}{number[2]}"
    chip = re.sub(r"-(ti|super|ti-super|laptop|mobile|gpu|d|pcie|sxm|nvl)\b", "", plain)
    for capability, devices in _DEVICES.items():
        if plain in devices or chip in devices:
            return capability
    raise Refused(
        f"there is no target {text!r} known here; targets are compute capabilities ({', '.join(_DEVICES)}), devices "
        f"(rtx-4090, jetson-orin, h100, ...), {PORTABLE!r} and {CURRENT!r}; look the device's compute capability up "
        "and name that"
    )


def check_targets(targets: Sequence[str], package: str, device: str | None) -> None:
    """Refuse what this TensorRT cannot build for, before any work.

    Args:
        targets: From :func:`target_names`.
        package: :data:`CLASSIC` or :data:`RTX`.
        device: Compute capability of the GPU in this machine, or None.

    Raises:
        Refused: Naming what can build it.
    """
    if package == RTX:
        for name in targets:
            if name not in (*_RTX_CAPABILITIES, PORTABLE, CURRENT):
                devices = ", ".join(_DEVICES[name])
                raise Refused(
                    f"TensorRT for RTX builds no engine for {name} ({devices}); such devices need classic TensorRT, "
                    "which builds on the device itself; write a build kit (--to tensorrt-kit) and run it there"
                )
        if CURRENT in targets and device is None:
            raise Refused(
                "there is no GPU in this machine to build for; target 'current' means it; name the device's compute "
                "capability, for example sm_89"
            )
        return
    if device is None:
        raise Refused(
            "classic TensorRT builds on the GPU it builds for, and there is none in this machine; write a build kit "
            "(--to tensorrt-kit) and run it on the target, or install tensorrt-rtx instead, which needs no GPU"
        )
    if len(targets) > 1 or (targets[0] not in (PORTABLE, CURRENT) and targets[0] != device):
        raise Refused(
            f"classic TensorRT builds for the GPU it runs on, {device}, not for {','.join(targets)}; write a build kit "
            f"(--to tensorrt-kit) and run it on the target, or ask for {CURRENT!r} or {PORTABLE!r}"
        )


def package_here() -> str | None:
    """Import name of the TensorRT that is installed, the classic one first; None when there is neither."""
    return next((name for name in (CLASSIC, RTX) if importlib.util.find_spec(name) is not None), None)


def device_capability() -> str | None:
    """Compute capability ("sm_86") of the first GPU by the CUDA driver; None without a driver or a GPU."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda: Any = ctypes.CDLL(library)
        except OSError:
            continue
        device = ctypes.c_int()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
            numbers = (ctypes.c_int(), ctypes.c_int())
            for attribute, number in zip((75, 76), numbers, strict=True):
                cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            return "sm_" + "".join(str(number.value) for number in numbers)
    return None


def read_kit(folder: Path) -> dict[str, Any]:
    """The kit in ``folder``, with every file it names checked against its digest.

    Raises:
        Refused: If it is missing, of another schema, or a file is missing or altered.
    """
    try:
        kit: dict[str, Any] = json.loads((folder / KIT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{folder / KIT_FILE} cannot be read; {error}; carry the whole folder here again") from error
    if kit.get("schema") != KIT_SCHEMA:
        raise Refused(
            f"{folder / KIT_FILE} has schema {kit.get('schema')!r}; this script reads {KIT_SCHEMA!r}; use the script "
            "that came with it"
        )
    for name, record in kit["files"].items():
        file = folder / name
        if Path(name).name != name or not file.is_file() or sha256(file) != record["sha256"]:
            raise Refused(
                f"{name} is missing or differs from the digest in {KIT_FILE}; an engine of it would be of another "
                "model; carry the whole folder here again"
            )
    return kit


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def build(
    folder: Path, out: Path, *, targets: Sequence[str] | None = None, timing_cache: Path | None = None
) -> dict[str, Any]:
    """Build the kit in ``folder`` into ``out``: the engine, a report and, with a GPU, what each layer became.

    Args:
        folder: A build kit.
        out: Folder for the engine; made when missing.
        targets: From :func:`target_names`; the kit's own when omitted.
        timing_cache: File to read measured timings from and to write them back to; TensorRT for RTX measures
            nothing when it builds and takes none.

    Returns:
        What the report file holds.

    Raises:
        Refused: If the files, the parser or the builder say no; the node is named where TensorRT tells.
    """
    kit = read_kit(folder)
    package = package_here()
    if package is None:
        raise Refused("neither tensorrt nor tensorrt_rtx can be imported; one of them builds; pip install one of them")
    device = device_capability()
    targets = tuple(targets or kit["targets"])
    check_targets(targets, package, device)
    trt = importlib.import_module(package)
    messages: list[str] = []
    log = _logger(trt, messages)
    # Every object is kept in a name: TensorRT's own do not hold each other, and one that is freed early crashes.
    builder = trt.Builder(log)
    network = builder.create_network(_creation_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(folder / kit["network"])):
        raise Refused(_parser_refusal(parser, network, messages))
    _check_network(trt, network, kit)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # TF32 keeps 10 bits of a float32's mantissa; fp32 here means all 23.
    config.clear_flag(trt.BuilderFlag.TF32)
    _set_targets(trt, config, targets, package)
    for profile in kit["profiles"]:
        _add_profile(builder, config, profile)
    cache = _timing_cache(config, timing_cache, package)
    begin = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - begin
    if engine is None:
        raise Refused(_build_refusal(network, messages, targets))
    size = int(engine.nbytes)
    kinds = _network_facts(network)
    audit = audit_weights(
        engine_bytes=size,
        weight_bytes=kit["weight_bytes"],
        precision=kit["precision"],
        n_layers=kinds["layers"],
        n_profiles=len(kit["profiles"]),
        package=package,
    )
    if audit["verdict"] == "refused":
        raise Refused(f"{audit['words']}; such an engine is mislabelled; report this with the build kit")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ENGINE_FILE).open("wb") as stream:
        stream.write(engine)
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
    layers = _layer_information(trt, log, engine, device)
    if layers is not None:
        (out / LAYERS_FILE).write_text(layers, encoding="utf-8")
    report = {
        "schema": REPORT_SCHEMA,
        "engine": {"file": ENGINE_FILE, "bytes": size, "sha256": sha256(out / ENGINE_FILE)},
        "network": {"file": kit["network"], "sha256": kit["files"][kit["network"]]["sha256"], **kinds},
        "precision": kit["precision"],
        "targets": list(targets),
        "runtime": {
            "package": package,
            "version": str(trt.__version__),
            "device": device,
            "strongly_typed": True,
            "timing_cache": "used" if cache is not None else _no_cache_words(timing_cache, package),
            "layer_information": LAYERS_FILE if layers is not None else "needs a GPU that can load the engine",
        },
        "build_s": round(seconds, 3),
        "audit": audit,
        "executed": False,
        "execution": "built and not executed: building proves that the device's compiler takes the graph, not that it "
        "computes the same",
    }
    (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def audit_weights(
    *, engine_bytes: int, weight_bytes: int, precision: str, n_layers: int, n_profiles: int, package: str
) -> dict[str, Any]:
    """Judge by its size whether an engine holds its weights in the element type that was asked for.

    TensorRT 11 took its float16 switch away, and tools that still ask by it get float32 engines without a word.  The
    size tells: an engine is its weights plus code, and the code grows with the network's layers.  That holds for
    TensorRT for RTX, where it was measured.  Classic TensorRT also stores what its chosen kernels want at hand, weights
    in a second layout among it, so there a great size tells nothing.

    Returns:
        ``ratio`` (engine over weights), ``code_bytes`` (allowed for), ``verdict`` ("holds", "refused", or "cannot
        tell" where the weights are small beside the code) and ``words``.
    """
    code = _CODE_BYTES + _CODE_BYTES_PER_LAYER * n_layers * n_profiles
    facts = {"engine_bytes": engine_bytes, "weight_bytes": weight_bytes, "code_bytes": code}
    ratio = engine_bytes / max(1, weight_bytes)
    said = f"the engine has {engine_bytes} bytes for {weight_bytes} bytes of {precision} weights"
    # Beyond this the allowance for code could hide a second copy of the weights.
    if code > (2 - _MOST_WEIGHTS) * weight_bytes:
        verdict, words = "cannot tell", f"{said}, too few beside its code to tell by"
    elif engine_bytes < _LEAST_WEIGHTS * weight_bytes:
        verdict, words = "refused", f"{said}; weights are missing"
    elif engine_bytes > _MOST_WEIGHTS * weight_bytes + code and package == CLASSIC:
        verdict, words = "cannot tell", f"{said}; a wider type, or what its kernels keep beside them"
    elif engine_bytes > _MOST_WEIGHTS * weight_bytes + code:
        verdict, words = "refused", f"{said}; it holds them in a wider type"
    else:
        verdict, words = "holds", said
    return {**facts, "ratio": round(ratio, 4), "verdict": verdict, "words": words}


def _creation_flags(trt: Any) -> int:
    """Strong typing: precision is what the graph says.  The only mode of TensorRT 11 and RTX, a choice in 10."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _logger(trt: Any, messages: list[str]) -> Any:
    # A process has one logger, whichever came first; errors are also where TensorRT says which node it means.
    class Log(trt.ILogger):  # type: ignore[misc]  # TensorRT ships no type information
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Log()


def _parser_refusal(parser: Any, network: Any, messages: Sequence[str]) -> str:
    """The parser's first error: code, node, operator and reason."""
    if not parser.num_errors:
        return f"TensorRT cannot read the ONNX file; {_brief(messages)}; export it again"
    error = parser.get_error(0)
    code = getattr(error.code(), "name", str(error.code()))
    # Some errors carry no node; the function that raised them is called after the operator, and the layers made so
    # far end before the node.
    importer = re.fullmatch(r"import(\w+)", error.func() or "")
    if error.node() >= 0:
        name, operator = error.node_name() or str(error.node()), error.node_operator()
        what = f"TensorRT's parser refuses node {name!r} (operator {operator})"
    elif importer and network.num_layers:
        before = _onnx_name(network.get_layer(network.num_layers - 1))
        what = f"TensorRT's parser refuses the {importer[1]} that follows node {before!r}"
    else:
        what = "TensorRT's parser refuses the file"
    more = f" and {parser.num_errors - 1} more" if parser.num_errors > 1 else ""
    return f"{what}{more}; {code}: {_brief([error.desc()])}; the model cannot be a TensorRT engine as it is"


def _build_refusal(network: Any, messages: Sequence[str], targets: Sequence[str]) -> str:
    """The builder's errors, with the ONNX node they are about where a name or an operator in them tells."""
    text = " ".join(messages)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    named = [layer for layer in layers if layer.name and re.search(rf"(?<!\w){re.escape(layer.name)}(?!\w)", text)]
    if not named:
        words = set(re.findall(r"\w+", text.lower()))
        kinds = {layer.type for layer in layers} - {None}
        about = {kind for kind in kinds if _kind(kind).split("_")[0].lower() in words - _COMMON_WORDS}
        named = [layer for layer in layers if layer.type in about]
    nodes = list(dict.fromkeys(_onnx_name(layer) for layer in sorted(named, key=lambda layer: -len(layer.name))))
    where = f" at node {nodes[0]!r}" if nodes else ", which names no node"
    return (
        f"TensorRT parses the graph and refuses to build it for {','.join(targets)}{where}; {_brief(messages)}; "
        "try another target or precision"
    )


# Kinds of layer whose first word TensorRT also uses in any sentence.
_COMMON_WORDS = {"constant", "shape", "cast", "fill", "condition", "loop", "select", "identity", "reduce", "matrix"}


def _onnx_name(layer: Any) -> str:
    """Name of the ONNX node a layer came from; TensorRT keeps it in the metadata of those it renamed."""
    origin = re.search(r"\[ONNX Layer: ([^\]]+)\]", getattr(layer, "metadata", "") or "")
    return str(origin[1] if origin else layer.name)


def _brief(messages: Sequence[str]) -> str:
    """The message that tells most, on one line and without the places in TensorRT's own source."""
    # On a machine without a driver TensorRT reports that too, each time, and it is never the reason.
    lines = [[line for line in message.splitlines() if "cudaError 35" not in line] for message in messages]
    telling = ["\n".join(kept) for kept in lines if kept] or ["it gives no reason"]
    text = " ".join(_ERROR_CODES.sub("", telling[-1]).split())
    text = re.sub(r"^IBuilder::\w+: Error Code \d+: ", "", text)
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]}..."


def _check_network(trt: Any, network: Any, kit: Mapping[str, Any]) -> None:
    """Refuse a network whose inputs, outputs or layers are not what the kit promises."""
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    outputs = {network.get_output(index).name: network.get_output(index) for index in range(network.num_outputs)}
    for kind, found in (("inputs", inputs), ("outputs", outputs)):
        promised = {spec["name"]: spec["dtype"] for spec in kit[kind]}
        if set(found) != set(promised):
            raise Refused(
                f"TensorRT sees the {kind} {', '.join(sorted(found))}, the kit promises {', '.join(sorted(promised))}; "
                "one was folded away or added while parsing; report this as a bug"
            )
        for name, dtype in promised.items():
            if found[name].dtype != _dtype(trt, dtype):
                raise Refused(
                    f"TensorRT takes {name} as {found[name].dtype}, the kit promises {dtype}; the engine would not be "
                    f"the {kit['precision']} engine it is called; report this as a bug"
                )
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if _kind(layer.type).startswith("PLUGIN"):
            raise Refused(
                f"node {_onnx_name(layer)!r} became a plugin; an engine with plugins loads only where they are "
                "installed; use standard ONNX operators"
            )


def _dtype(trt: Any, name: str) -> Any:
    if name not in ("float32", "float16", "int64", "int32", "bool"):
        raise Refused(f"element type {name} of an input is unknown to TensorRT here; use float32, float16 or int64")
    return getattr(trt, name)


def _set_targets(trt: Any, config: Any, targets: Sequence[str], package: str) -> None:
    if package == CLASSIC:
        if PORTABLE in targets:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return
    if PORTABLE in targets:
        return  # unset means every device since Ampere
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        member = "CURRENT" if name == CURRENT else name.replace("_", "").upper()
        config.set_compute_capability(getattr(trt.ComputeCapability, member), index)


def _add_profile(builder: Any, config: Any, profile: Mapping[str, Any]) -> None:
    made = builder.create_optimization_profile()
    for name, sizes in profile["shapes"].items():
        made.set_shape(name, tuple(sizes["min"]), tuple(sizes["opt"]), tuple(sizes["max"]))
    if config.add_optimization_profile(made) < 0:
        raise Refused(f"TensorRT refuses the profile {profile['name']!r}; its sizes do not fit the inputs; change them")


def _timing_cache(config: Any, file: Path | None, package: str) -> Any:
    """The cache in use; TensorRT for RTX, which measures nothing when it builds, ignores one."""
    if file is None or package == RTX:
        return None
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise Refused(f"{file} is no timing cache of this TensorRT and device; delete it, or name another file")
    return cache


def _no_cache_words(file: Path | None, package: str) -> str:
    if file is not None and package == RTX:
        return "not used: TensorRT for RTX measures nothing when it builds"
    return "not asked for"


def _network_facts(network: Any) -> dict[str, Any]:
    """How many layers of which kind, and of which element type their outputs are."""
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds[_kind(layer.type)] += 1
        types.update(_kind(layer.get_output(output).dtype) for output in range(layer.num_outputs))
    return {"layers": int(network.num_layers), "layers_by_kind": dict(kinds), "outputs_by_type": dict(types)}


def _kind(member: Any) -> str:
    return str(getattr(member, "name", member)).rpartition(".")[2]


def _layer_information(trt: Any, log: Any, engine: Any, device: str | None) -> str | None:
    """What each layer became, as TensorRT's inspector tells it; it has to load the engine for that."""
    if device is None:
        return None
    runtime = trt.Runtime(log)
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:  # built for another device than the one here
        return None
    inspector = loaded.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the script; a refusal prints one line and gives exit status 1."""
    parser = argparse.ArgumentParser(prog=SCRIPT_FILE, description="Build the TensorRT engine of this build kit.")
    parser.add_argument("--kit", type=Path, default=Path(__file__).resolve().parent, help="folder of the kit")
    parser.add_argument("--target", help="device or compute capability, or several (default: the kit's)")
    parser.add_argument("--out", type=Path, help="folder for the engine (default: built/TARGET in the kit)")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="read measured timings, and write them back")
    given = parser.parse_args(arguments)
    try:
        targets = target_names(given.target) if given.target else tuple(read_kit(given.kit)["targets"])
        out = given.out or given.kit / "built" / "-".join(targets)
        report = build(given.kit, out, targets=targets, timing_cache=given.timing_cache)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    megabytes = report["engine"]["bytes"] / 1e6
    words = f"{out / ENGINE_FILE}: {megabytes:.1f} MB for {','.join(report['targets'])} in {report['build_s']:.1f} s"
    print(f"{words}; {report['execution']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
