"""Is a GGUF file what was meant: these layers in this order, every tensor there, of its type and with its values?

It is read with the ``gguf`` package and compared with the pruned model in memory.  So it needs neither the converter
nor llama.cpp.  Bounds on logits cannot name a wrong tensor.  This does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.errors import ArtifactError

if TYPE_CHECKING:
    from sglp_deploy.parity.diagnosis import StoredTensor

Array = NDArray[np.float32]

# Roles whose tensors llama.cpp's converter always keeps in float32, whatever the rest is rounded to.
_ALWAYS_F32 = re.compile(
    r"_norm\.weight$|ffn_gate_inp|ssm_conv1d|shortconv\.conv\.|position_embd|token_types|time_mix_|altup_|(?<!\.weight)$"
)
_PLAIN_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "int8"}
# Made by the converter from settings; the model has no such tensor.
_FROM_SETTINGS = re.compile(r"^rope_(freqs|factors_long|factors_short)\.weight$")
# A value rounded to Q8_0 lies within half a step of its block's scale; the scale itself is rounded to fp16 (11 bits),
# which moves the 127th step by 127 / 2048 of one.
_Q8_0_BLOCK, _Q8_0_STEPS = 32, 0.5 + 127 / 2048
# Scales below 2**-14 are multiples of 2**-24, so one lies up to half of that from what it should be.
_Q8_0_LEAST = 127 * 2.0**-25


@dataclass(frozen=True)
class Comparison:
    """What comparing a file with a model found.

    Attributes:
        faults: What is wrong, one sentence each; empty when nothing is.
        compared: Tensors whose values were compared.
        not_compared: Roles ("blk.*.attn_qkv.weight") that the converter rearranges in a way that is not known here.
    """

    faults: tuple[str, ...]
    compared: int
    not_compared: tuple[str, ...]


def compare(file: Path, weights: Mapping[str, Any], *, n_layers: int, kind: str, heads: tuple[int, int]) -> Comparison:
    """Compare a GGUF file with the weights of the model it was made of.

    Args:
        file: The GGUF file.
        weights: Names to tensors, as ``state_dict`` gives them.
        n_layers: Layers there should be.
        kind: Type of the matrices: "F32", "F16", "BF16" or "Q8_0".
        heads: Attention heads and key-value heads.

    Raises:
        ArtifactError: If the file cannot be read as GGUF.
    """
    import gguf

    reader, architecture = _opened(file)
    found_layers = reader.fields[f"{architecture}.block_count"].contents()
    written = {tensor.name: tensor for tensor in reader.tensors}
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        return Comparison((), 0, (f"everything: this gguf package does not know {architecture!r}",))
    faults = []
    if found_layers != n_layers:
        faults.append(f"{file.name} says it has {found_layers} layers; the plan keeps {n_layers}")
    names = gguf.get_tensor_name_map(numbers[architecture], n_layers)
    meant: dict[str, Any] = {}
    for name, value in _distinct(weights):
        for part, tensor in _parts(name, value):
            mapped = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if mapped is not None:
                # What is no module's weight in the model may be called one in the file.
                meant[f"{mapped}.weight" if f"{mapped}.weight" in written else mapped] = tensor
    numbered = {name for name in written if re.match(r"blk\.\d+\.", name)}
    unknown = sorted(name for name in written.keys() - meant.keys() if not _FROM_SETTINGS.match(name))
    extra = [name for name in unknown if name in numbered and int(name.split(".")[1]) >= n_layers]
    faults += [f"{name} belongs to no layer that was kept" for name in extra]
    # A tied head may be written out; every other tensor the model does not name is the converter's own arrangement.
    roles = {_role(name) for name in unknown if name not in extra}
    faults += [f"{name} is missing" for name in sorted(meant.keys() - written.keys()) if _role(name) not in roles]
    shared = {name: written[name] for name in sorted(meant.keys() & written.keys())}
    wrong, odd, compared = _values(shared, meant, kind, heads)
    return Comparison((*faults, *wrong), compared, tuple(sorted(roles | odd)))


def stored_weights(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a file by its own names; heads lie as transformers has them.

    Raises:
        ArtifactError: If the file cannot be read as GGUF.
    """
    from sglp_deploy.parity.diagnosis import StoredTensor

    reader, architecture = _opened(file)
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
        heads = _heads(reader, architecture, tensor.name)
        yield StoredTensor(
            tensor.name, _PLAIN_NAMES.get(kind, kind.lower()), shape, partial(_as_in_the_model, tensor, heads)
        )


def _opened(file: Path) -> tuple[Any, str]:
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        reader.fields[f"{architecture}.block_count"].contents()
    except Exception as error:
        raise ArtifactError(
            f"{file} cannot be read as GGUF; {type(error).__name__}: {str(error).splitlines()[0]}; export it again"
        ) from error
    return reader, architecture


def _heads(reader: Any, architecture: str, name: str) -> int:
    """Heads whose rows the converter rearranged in this tensor; 0 where it did not."""
    if architecture != "llama" or not re.search(r"\.attn_[qk]\.", name):
        return 0
    field = reader.fields.get(f"llama.attention.head_count{'' if '.attn_q.' in name else '_kv'}")
    return int(field.contents()) if field is not None else 0


def _as_in_the_model(tensor: Any, heads: int) -> Array:
    values = _stored(tensor)
    if not heads:
        return values
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _distinct(weights: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors by name, without a second name for the same memory (a tied head)."""
    seen = set()
    for name, value in weights.items():
        place = (value.data_ptr(), tuple(value.shape))
        if place not in seen:
            seen.add(place)
            yield name, value


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A tensor under the names a file has for it: the experts of a layer are one tensor each for gate, up and down."""
    if name.endswith("experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), value.shape[1] // 2
        yield f"{stem}gate_proj.weight", value[:, :half]
        yield f"{stem}up_proj.weight", value[:, half:]
    else:
        yield f"{name}.weight" if name.endswith("experts.down_proj") else name, value


def _values(
    written: Mapping[str, Any], meant: Mapping[str, Any], kind: str, heads: tuple[int, int]
) -> tuple[list[str], set[str], int]:
    """Faults, roles in which no tensor agrees though several should, and how many tensors were compared."""
    faults: list[str] = []
    failed: dict[str, list[str]] = {}
    forms: dict[str, str] = {}
    compared = 0
    for name, tensor in written.items():
        wanted = _expected_type(name, tensor, kind)
        if tensor.tensor_type.name != wanted:
            faults.append(f"{name} is {tensor.tensor_type.name}; {wanted} was asked for")
            continue
        model = np.asarray(meant[name].detach().float().cpu().numpy())
        role = _role(name)
        form = next((form for form, values in _forms(name, model, heads) if _agrees(tensor, values)), None)
        compared += 1
        if form is None or forms.setdefault(role, form) != form:
            failed.setdefault(role, []).append(name)
    for role, names in failed.items():
        if role in forms or "*" not in role:
            faults += [_complaint(name, written, meant, heads) for name in names]
    # In no layer does it agree: the converter arranges it in a way of its own.
    odd = {role for role in failed if role not in forms and "*" in role}
    return faults, odd, compared - sum(len(failed[role]) for role in odd)


def _expected_type(name: str, tensor: Any, kind: str) -> str:
    if len(tensor.shape) < 2 or _ALWAYS_F32.search(name):
        return "F32"
    if kind == "Q8_0" and int(tensor.shape[0]) % _Q8_0_BLOCK:
        return "F16"  # a row that cannot be cut into blocks
    return kind


def _forms(name: str, values: Array, heads: tuple[int, int]) -> Iterator[tuple[str, Array]]:
    """The ways a converter writes ``values``: as they are, rotary pairs beside each other, or a norm counted from 0."""
    yield "as it is", values
    if re.search(r"\.attn_[qk]\.", name):
        count = heads[0] if ".attn_q." in name else heads[1]
        if count and values.shape[0] % (2 * count) == 0:
            # transformers rotates the first half of a head against the second; llama.cpp's llama rotates neighbours.
            halves = values.reshape(count, 2, values.shape[0] // count // 2, -1)
            yield "rotary pairs", np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    if "norm" in name:
        yield "one added", values + np.float32(1)
        # Of a float16 model the converter adds in float16.
        yield "one added in float16", (values.astype(np.float16) + np.float16(1)).astype(np.float32)
    if values.ndim == 2:
        yield "transposed", np.ascontiguousarray(values.T)


def _agrees(tensor: Any, values: Array) -> bool:
    """Whether the file's tensor is ``values``, bit for bit or rounded no further than its type must."""
    kind = tensor.tensor_type.name
    stored = _stored(tensor)
    if stored.size != values.size or (stored.ndim > 1 and stored.shape != values.shape):
        return False
    values = values.reshape(stored.shape)
    if not np.isfinite(stored).all():
        return False
    if kind == "F32":
        return bool(np.array_equal(stored, values))
    if kind == "F16":
        return bool(np.array_equal(stored, values.astype(np.float16).astype(np.float32)))
    if kind == "BF16":
        return bool(np.array_equal(stored, _nearest_bf16(values)))
    blocks = values.reshape(-1, _Q8_0_BLOCK)
    bound = np.abs(blocks).max(axis=1, keepdims=True) * (_Q8_0_STEPS / 127) + _Q8_0_LEAST
    return bool((np.abs(stored.reshape(blocks.shape) - blocks) <= bound).all())


def _stored(tensor: Any) -> Array:
    import gguf

    values: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.astype(np.float32, copy=False)


def _nearest_bf16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _complaint(name: str, written: Mapping[str, Any], meant: Mapping[str, Any], heads: tuple[int, int]) -> str:
    """What ``name`` holds instead of what it should: another layer's values, or how far off they are."""
    role = _role(name)
    for other, value in meant.items():
        if other != name and _role(other) == role:
            model = np.asarray(value.detach().float().cpu().numpy())
            if any(_agrees(written[name], values) for _, values in _forms(other, model, heads)):
                return f"{name} holds what belongs in {other}"
    stored, model = _stored(written[name]), np.asarray(meant[name].detach().float().cpu().numpy())
    if stored.size != model.size:
        return f"{name} has the shape {stored.shape}; the model's is {model.shape}"
    with np.errstate(invalid="ignore"):
        gaps = [
            np.nanmax(np.abs(stored.reshape(-1) - values.reshape(-1)), initial=0.0)
            for _, values in _forms(name, model, heads)
        ]
    bad = int((~np.isfinite(stored)).sum())
    if bad:
        return f"{name} holds {bad} values that are not finite"
    return f"{name} differs from the model's by up to {min(gaps):.3g}"


def _role(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "blk.*.", name)
