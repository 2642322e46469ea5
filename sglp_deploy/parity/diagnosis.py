"""Say which tensor or layer of an artifact is wrong, once numbers have shown that something is.

A certificate tells that an artifact computes something else and at which position.  A person who has to mend it wants
the name.  Three things can be named: stored weights of another type than the manifest says, stored weights that are not
the model's, and the first layer whose keys and values are not the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglp_deploy.artifact import CACHE_PARTS, ELEMENT_TYPES, PRESENT, cache_name
from sglp_deploy.errors import BackendError
from sglp_deploy.protocols import Runner

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact

_WHOLE_NUMBERS = ("int8", "uint8", "int4", "uint4")
# Of the elements.  The embedding may stay wide, and two values of 4 bits may count as one of 8: Gemma-3 270M has 0.23.
_LEAST_QUANTISED = 0.1
# Bytes a quantised weight: 0.54 to 0.60 of int4 in blocks of 32, with some matrices in 8 bits; 1.03 and more of int8.
_FEWEST_OF_8_BITS = 0.9
_MOST_OF_A_TABLE = 1.05  # scales and zeros beside the values
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
_TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ELEMENT_TYPES.values()}
_MOST_NAMED = 3
_PROMPT = 6  # within every window, so that a cache that forgets has forgotten nothing
# Distance of two caches over the size of one: what a runtime's rounding makes of float32 is 1e-5, of float16 1e-2.
_SAME_CACHE = {"fp32": 1e-3, "fp16": 0.05}


@dataclass(frozen=True)
class StoredTensor:
    """One weight as it lies in an artifact's files.

    Attributes:
        name: Its name in the file.
        dtype: Its type there, by numpy's name ("float32", "bfloat16", "int8").
        shape: Its shape there; a matrix may lie the other way round than in the model.
        read: Reads the values, as float32 where they are floating point.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @property
    def elements(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))


def stored_type_fault(precision: str, stored: Iterable[StoredTensor], model: nn.Module | None = None) -> str | None:
    """What is wrong with the types of the stored weights for an artifact of this precision, or None.

    The bounds of a certificate follow the precision the manifest names, so a wrong name would loosen them.

    Args:
        precision: What the manifest says.
        stored: The weights as they lie in the files.
        model: The pruned model; tells weights of 4 bits, two in a byte, from those of 8.
    """
    amounts: dict[str, int] = {}
    largest: dict[str, StoredTensor] = {}
    for tensor in stored:
        amounts[tensor.dtype] = amounts.get(tensor.dtype, 0) + tensor.elements
        if tensor.dtype not in largest or tensor.elements > largest[tensor.dtype].elements:
            largest[tensor.dtype] = tensor
    floats = {kind: count for kind, count in amounts.items() if kind in ELEMENT_TYPES.values()}
    if precision in ELEMENT_TYPES and floats:
        most = max(floats, key=lambda kind: floats[kind])
        if most != ELEMENT_TYPES[precision]:
            return (
                f"wrong dtype: {floats[most] / sum(floats.values()):.0%} of the weights are stored as {most}, "
                f"{largest[most].name} for one, and the manifest says {precision}"
            )
    if precision in ("int8", "int4") and amounts:
        whole = sum(amounts.get(kind, 0) for kind in _WHOLE_NUMBERS)
        if whole < _LEAST_QUANTISED * max(1, whole + sum(floats.values())):
            most = max(floats, key=lambda kind: floats[kind], default="nothing")
            return f"wrong dtype: the weights are stored as {most}, and the manifest says {precision}"
        in_bytes = [kind for kind in ("int8", "uint8") if kind in amounts]
        if precision == "int4" and model is not None and in_bytes:
            limit = _most_bytes_of_int4(model, sum(floats.values()), max(largest[kind].elements for kind in in_bytes))
            if sum(amounts[kind] for kind in in_bytes) > limit:
                return "wrong dtype: the weights are stored in 8 bits each, and the manifest says int4"
    return None


def stored_bytes(stored: Iterable[StoredTensor], *, once: bool = False) -> int:
    """Bytes that the tensors take whose types are known here; at least.

    Args:
        stored: The weights as they lie in the files.
        once: Read them, and count equal ones once, as a file may hold them.
    """
    known = [tensor for tensor in stored if tensor.dtype in _BYTES]
    sizes = [tensor.elements * _BYTES[tensor.dtype] for tensor in known]
    if not once:
        return sum(sizes)
    contents = (
        (tensor.dtype, tensor.shape, sha256(np.ascontiguousarray(tensor.read()).tobytes()).digest()) for tensor in known
    )
    return sum(dict(zip(contents, sizes, strict=True)).values())


def _most_bytes_of_int4(model: nn.Module, floating: int, largest: int) -> float:
    """Bytes above which the whole numbers in a file cannot be those of a model in 4 bits.

    A table of tokens, and a head that is one with it, may have 8 bits.  Such a head may also be stored both ways: wide
    as the table, and quantised.

    Args:
        model: The pruned model.
        floating: Values that are stored as floating point.
        largest: Elements of the largest tensor of whole numbers.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    sizes = [parameter.numel() for parameter in model.parameters()]
    twice = len(names) > len(sizes) and largest > 0.45 * max(sizes)
    values = sum(sizes) if twice else max(0, sum(sizes) - floating)
    if not values:  # every value is there as floating point; of which the others are is not known
        return float("inf")
    table = min(max(sizes), values)
    return _FEWEST_OF_8_BITS * (values - table) + _MOST_OF_A_TABLE * table


def weight_faults(model: nn.Module, stored: Iterable[StoredTensor]) -> list[str]:
    """Names of stored weights that are not the model's, with what they are instead; at most three.

    A stored tensor that equals no parameter is compared with the parameter its name says, else with the nearest one of
    its shape that is missing from the file.  Tensors an exporter makes up (tables, folded norms) are near to none.
    """
    parameters = {name: value.detach().cpu() for name, value in model.named_parameters()}
    known: dict[tuple[str, str], list[str]] = {}
    strangers: list[StoredTensor] = []
    found: set[str] = set()
    misplaced: list[str] = []
    for tensor in stored:
        if tensor.dtype not in _TORCH or tensor.elements < 2:
            continue
        if not any(kind == tensor.dtype for kind, _ in known):
            for name, value in parameters.items():
                for digest in _digests(_in_type(value, tensor.dtype)):
                    known.setdefault((tensor.dtype, digest), []).append(name)
        same = known.get((tensor.dtype, _digest(tensor.read())), [])
        found.update(same)
        meant = _meant(tensor.name, parameters)
        if not same:
            strangers.append(tensor)
        elif meant is not None and meant not in same:
            misplaced.append(f"the stored weight {tensor.name} is not the model's: it holds the values of {same[0]}")
    missing = {name: value for name, value in parameters.items() if name not in found}
    words = [_compare(tensor, missing) for tensor in strangers]
    return [*misplaced, *(line for line in words if line)][:_MOST_NAMED]


def cache_faults(runner: Runner, model: nn.Module, artifact: ExportArtifact) -> list[str]:
    """The first layer whose keys or values are not the model's, for a runner that hands its cache out; else nothing.

    Args:
        runner: Of the artifact, entered.
        model: The pruned torch model, whose layers' caches are compared.
        artifact: Says which inputs there are, and the precision.
    """
    from transformers import DynamicCache

    if artifact.precision not in _SAME_CACHE:
        return []
    config: Any = model.config
    ids = np.arange(1, _PROMPT + 1, dtype=np.int64)[None] % config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(_PROMPT)[None]}
    known = {spec.name for spec in artifact.inputs} or set(inputs)
    try:
        outputs = runner.forward({name: value for name, value in inputs.items() if name in known})
    except BackendError:  # a runtime with other inputs; the certificate itself says that something is wrong
        return []
    cache = DynamicCache(config=config)
    with torch.no_grad():
        device = next(model.parameters()).device
        model(input_ids=torch.from_numpy(ids).to(device), past_key_values=cache, use_cache=True)
    layers: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    right = {
        cache_name(PRESENT, index, part): getattr(layer, f"{part}s").float().cpu().numpy()
        for index, layer in enumerate(layers)
        for part in CACHE_PARTS
    }
    return _first_wrong(
        {name: outputs[name] for name in right if name in outputs}, right, _SAME_CACHE[artifact.precision]
    )


def _first_wrong(given: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[np.float32]], same: float) -> list[str]:
    for name, value in given.items():
        distance = _distance(value, right[name])
        if distance <= same:
            continue
        twin = next((other for other in right if other != name and _distance(value, right[other]) <= same), None)
        if twin is not None:
            return [f"cache of the wrong layer: {name} holds what the model keeps as {twin}"]
        layer = int(name.split(".")[1])
        before = (
            f"the caches of the layers before it agree, so the fault lies in layer {layer - 1}"
            if layer
            else "the fault lies in the embedding"
        )
        part = name.split(".")[2]
        return [
            f"the cache {name} differs from the model's by {distance:.2g} of its size; {before} or in what layer "
            f"{layer} makes its {part}s from"
        ]
    return []


def _distance(value: NDArray[Any], other: NDArray[np.float32]) -> float:
    """Relative distance of two caches; a windowed one holds the last tokens only, and infinity where shapes differ."""
    length = min(value.shape[-2], other.shape[-2]) if value.ndim == other.ndim == 4 else 0
    left, right = value[..., -length:, :].astype(np.float32), other[..., -length:, :]
    if not length or left.shape != right.shape:
        return float("inf")
    distance = float(np.linalg.norm(left - right) / max(float(np.linalg.norm(right)), 1e-12))
    return distance if np.isfinite(distance) else float("inf")


def _in_type(value: torch.Tensor, dtype: str) -> NDArray[np.float32]:
    return value.to(_TORCH[dtype]).float().numpy()


def _digest(value: NDArray[Any]) -> str:
    plain = np.ascontiguousarray(value, dtype=np.float32)
    return f"{plain.shape if plain.ndim > 1 else plain.size}:{sha256(plain.tobytes()).hexdigest()}"


def _digests(value: NDArray[np.float32]) -> list[str]:
    return [_digest(value), _digest(value.T)] if value.ndim == 2 else [_digest(value)]


def _meant(stored: str, names: Iterable[str]) -> str | None:
    """The parameter whose name the stored one begins with, or begins with but for a word before ``.weight``."""

    def fits(name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return stored.startswith(name) or (stored.startswith(f"{owner}.") and stored.endswith(f".{leaf}"))

    return max(filter(fits, names), key=len, default=None)


def _compare(tensor: StoredTensor, missing: Mapping[str, torch.Tensor]) -> str | None:
    value = tensor.read().astype(np.float32)
    candidates = {
        name: laid for name, weight in missing.items() if (laid := _laid(weight, value, tensor.dtype)) is not None
    }
    if not candidates:
        return None
    meant = _meant(tensor.name, candidates)
    name = meant or min(candidates, key=lambda each: _off(value, candidates[each]))
    right = candidates[name]
    wrong = value != right
    # A table or a folded norm has nothing in common with any parameter; a damaged weight has most of its values.
    if meant is None and wrong.mean() > 0.5 and _off(value, right) > 0.1:
        return None
    for kind in ("float16", "bfloat16"):
        if kind != tensor.dtype and np.array_equal(value, torch.from_numpy(right).to(_TORCH[kind]).float().numpy()):
            return f"wrong dtype: the stored weight {tensor.name} holds {name} rounded to {kind}"
    most = float(np.nanmax(np.abs(np.where(np.isfinite(value), value, np.inf) - right)))
    stored = "" if tensor.name == name else f" (the model's {name})"
    return (
        f"the stored weight {tensor.name}{stored} differs in {int(wrong.sum())} of {value.size} values, by {most:.3g} "
        "at most"
    )


def _laid(weight: torch.Tensor, value: NDArray[np.float32], dtype: str) -> NDArray[np.float32] | None:
    """``weight`` as the stored value lies, or None where its shape does not fit."""
    plain = _in_type(weight, dtype)
    options: Sequence[NDArray[np.float32]] = [plain, plain.T] if plain.ndim == 2 else [plain]
    fitting = [each for each in options if each.shape == value.shape]
    return min(fitting, key=lambda each: _off(value, each), default=None)


def _off(value: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Share of values that differ, then how far they do."""
    return float((value != right).mean()) + min(1.0, float(np.abs(np.nan_to_num(value) - right).mean()))


def read_stored(exporter: Any, artifact: ExportArtifact) -> list[StoredTensor]:
    """The weights in the artifact's files, for an exporter that can list them (``stored_weights``); else none.

    Raises:
        BackendError: If the files cannot be read.
    """
    lister = getattr(exporter, "stored_weights", None)
    try:
        return [] if lister is None else list(lister(artifact))
    except Exception as error:
        said = (str(error).strip() or "no message").splitlines()[0]
        raise BackendError(
            f"the weights in {artifact.path} cannot be listed; {type(error).__name__}: {said}; export it again"
        ) from error
