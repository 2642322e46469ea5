"""What lies beside a model's weights and belongs beside the pruned model's: processors, code, tokenizers, licences.

A library writes what it has read.  Files it did not read, and those another release would write otherwise, travel as
they are.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy import _io
from sglp_deploy._io import FILE_LIST
from sglp_deploy.artifact import CERTIFICATE, MANIFEST, PLAN_FILE
from sglp_deploy.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedTokenizerBase

    from sglp_deploy.models.base import ModelSource

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".npz", ".onnx", ".data"),
    *(".onnx_data", ".engine", ".tflite", ".pte", ".mlmodel", ".pkl", ".pickle", ".index.json"),
)
_MODEL_CARD = "describes the unpruned model"
_OTHER_WEIGHTS = "holds weights of the unpruned model"
# Beside the whole model's own; what each is wrong about.
_WRONG = {
    "readme.md": _MODEL_CARD,
    "model_index.json": _MODEL_CARD,
    "adapter_config.json": "belongs to an adapter for the unpruned model",
    "quantize_config.json": "says how weights were quantised that are written anew",
    "quant_config.json": "says how weights were quantised that are written anew",
    "hf_quant_config.json": "says how weights were quantised that are written anew",
    "trainer_state.json": "is of the training of the unpruned model",
    PLAN_FILE: "is the plan that the unpruned model was itself made by",
    CERTIFICATE: "is the certificate of the unpruned model's folder",
    MANIFEST: "lists the unpruned model's files",
}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_LARGEST = 256 * 1024**2  # bytes; the largest tokenizers have 40 MB
_WRITTEN = ("config.json", "generation_config.json", FILE_LIST)


@dataclass(frozen=True)
class SideFiles:
    """Files of a checkpoint that are not its weights.

    Attributes:
        travel: Paths below the folder, of files that are as right for the pruned model.
        left: Why others do not travel, by path below the folder; files of weights are not mentioned.
    """

    travel: tuple[Path, ...]
    left: Mapping[str, str]


def folder_of(source: ModelSource, module: Any = None) -> Path | None:
    """The folder a model's checkpoint lies in, or the hub's cached one; None for a GGUF file or a model in memory."""
    if source.gguf_file is not None:
        return None
    folder = Path(source.id)
    if source.id and (folder / "config.json").is_file():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    commit = getattr(getattr(module, "config", None), "_commit_hash", None)
    try:
        found = try_to_load_from_cache(source.id, "config.json", revision=commit)
    except HFValidationError:
        return None  # a name the user gave to a model in memory
    return Path(found).parent if isinstance(found, str) else None


def left_behind(source: ModelSource, module: Any, n_layers: int) -> Mapping[str, str]:
    """Why files beside a model's weights do not travel, by name; nothing for a model that lies in no folder."""
    folder = folder_of(source, module)
    return {} if folder is None else side_files(folder, n_layers).left


def side_files(folder: Path, n_layers: int) -> SideFiles:
    """What of ``folder`` belongs to its model beside the weights.

    A folder below it travels when a library's own list of parts (``modules.json``) names it or no weights lie in it.

    Args:
        folder: Of the unpruned model's checkpoint.
        n_layers: Its depth; a JSON file that states it as its own would be wrong beside fewer layers.
    """
    parts = _named_parts(folder)
    travel: list[Path] = []
    left: dict[str, str] = {}
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if name.startswith(".") or name in _WRITTEN:
            continue
        if entry.is_dir():
            inside = [file for file in sorted(entry.rglob("*")) if file.is_file()]
            if name not in parts and any(_is_weights(file) for file in inside):
                left[f"{name}/"] = _OTHER_WEIGHTS
            else:
                travel += [file.relative_to(folder) for file in inside if not _hidden(file.relative_to(folder))]
        elif entry.is_file() and not _is_weights(entry):
            why = _wrong(entry, n_layers)
            if why is None:
                travel.append(Path(name))
            else:
                left[name] = why
    return SideFiles(tuple(travel), left)


def copy_side_files(
    folder: Path, out: Path, n_layers: int, tokenizer: PreTrainedTokenizerBase | None
) -> Mapping[str, str]:
    """Put what belongs beside the weights from ``folder`` into ``out``, where a tokenizer may lie as it was saved.

    Tokenizer files are taken as they are where they read back as the same tokenizer: another release of the library
    writes them in a form that earlier ones do not read.

    Returns:
        Why others were left, by path below ``folder``.
    """
    found = side_files(folder, n_layers)
    if tokenizer is not None and not _is_theirs(folder, tokenizer):
        beside = (each for each in found.travel if not (out / each).exists() and not _is_of_a_tokenizer(each))
        found = SideFiles(tuple(beside), found.left)
    for path in found.travel:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, out / path)
    return found.left


def _is_of_a_tokenizer(path: Path) -> bool:
    """Whether a file is part of a tokenizer's state; another tokenizer would take it for its own."""
    name = path.name.lower()
    return path.parts[:-1] == () and (
        name.startswith(
            ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")
        )
        or name.endswith((".tiktoken", ".spm", ".bpe", ".model"))
    )


def _is_theirs(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the files in ``folder`` make this very tokenizer."""
    import transformers

    try:
        with quiet_libraries():
            read: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # noqa: BLE001  # tokenizers raises bare ones; the tokenizer was given in memory, and is written
        return False
    return type(read) is type(tokenizer) and _facts(read) == _facts(tokenizer)


def _facts(tokenizer: Any) -> tuple[Any, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        backend.to_str() if backend is not None else tokenizer.get_vocab(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.model_max_length,
        tokenizer.padding_side,
        tokenizer.truncation_side,
    )


def _named_parts(folder: Path) -> set[str]:
    """First folder of each part that sentence-transformers' list names."""
    parts = _io.json_of(folder / "modules.json", ours=False)
    named = [each.get("path") for each in parts if isinstance(each, dict)] if isinstance(parts, list) else []
    return {part for path in named if isinstance(path, str) for part in Path(path).parts[:1]}


def _is_weights(file: Path) -> bool:
    return file.name.lower().endswith(_WEIGHTS)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.parts)


def _wrong(file: Path, n_layers: int) -> str | None:
    """Why a file is not right for the pruned model; None when it is."""
    if why := _WRONG.get(file.name.lower()):
        return why
    if file.stat().st_size > _LARGEST:
        return f"is larger than {_LARGEST // 1024**2} MB, so no part of a checkpoint that is known"
    if file.suffix == ".json" and any(depth == n_layers for depth in _stated(_io.json_of(file, ours=False))):
        return f"states the {n_layers} layers of the unpruned model"
    return None


def _stated(value: Any) -> Iterator[Any]:
    """Depths that a JSON value states, at the top or in its parts."""
    if isinstance(value, dict):
        yield from (value[name] for name in DEPTHS if name in value)
        for part in value.values():
            yield from _stated(part)
