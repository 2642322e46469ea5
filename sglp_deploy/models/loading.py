"""Read a model the safe way: safetensors or GGUF, no remote code, no pickle unless the user says so."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sglp_deploy import _io
from sglp_deploy._names import may_be_hub_id, unknown_name
from sglp_deploy.artifact import ELEMENT_TYPES
from sglp_deploy.errors import ConfigError, SGLPError, UnsupportedModelError
from sglp_deploy.models.base import ModelSource
from sglp_deploy.models.gguf_facts import beyond_transformers, refuse_unread_tensors
from sglp_deploy.models.library import adapter_for, adapter_of_folder
from sglp_deploy.models.quiet import quiet_libraries
from sglp_deploy.models.side_files import DEPTHS
from sglp_deploy.models.transformers.adapter import model_class
from sglp_deploy.models.transformers.rules import PREDICTION_HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Elements of each tensor that enter the fingerprint.  A trained tensor differs from another one nearly everywhere, and
# reading all of a 70-billion-parameter model only to name it would take minutes.
_FINGERPRINT_SAMPLES = 1024

_DEEPEST = 10_000  # layers

_DTYPES: dict[str, torch.dtype] = {short: getattr(torch, name) for short, name in ELEMENT_TYPES.items()}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer if it has one, and where they came from."""

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    source: ModelSource


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the configuration and, of every tensor, name, shape, type and 1,024 evenly spaced elements."""
    digest = hashlib.sha256(facts_digest(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
        digest.update(flat[::step].to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def facts_digest(module: nn.Module) -> str:
    """SHA-256 of the configuration, without entries that a save or a load may change."""
    return _io.sha256_json(adapter_for(module).facts(module))


def source_of(module: nn.Module, name: str, gguf_file: str | None = None) -> ModelSource:
    """The identity of a model in memory, under the name a user gave it."""
    return ModelSource(name, fingerprint(module), facts_digest(module), gguf_file)


def precision(module: nn.Module) -> str:
    """Element type of the weights in the field's short form: "fp32", "fp16", "bf16", else torch's own name."""
    dtype = next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), torch.float32)
    return next((name for name, known in _DTYPES.items() if known is dtype), str(dtype).removeprefix("torch."))


def load_model(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a model from a folder, a ``.gguf`` file or a hub identifier, with the class its checkpoint names.

    Its identity is that of the stored weights, whatever type they are loaded in: a plan made with one serves the other.
    So a model that is loaded in another type than it is stored in is read twice.

    Args:
        model: A checkpoint folder, a GGUF file (dequantised to float32), or a hub identifier when online.
        device: Where the weights go, for example ``"cpu"`` or ``"cuda:0"``.
        dtype: ``"auto"`` (as stored), ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Accept a checkpoint stored as pickle (then read with ``weights_only=True``).

    Raises:
        ConfigError: If the model does not exist, is stored as pickle, or an option is unknown.
        UnsupportedModelError: If transformers does not know its architecture.
    """
    import transformers

    if dtype != "auto" and dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, ("auto", *_DTYPES))
    _check_device(device)
    path = Path(model)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    gguf_file = None
    location = str(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; a GGUF file was expected there; check the path")
        gguf_file, location = path.name, str(path.parent)
        options["gguf_file"] = gguf_file
    elif path.is_dir():
        _check_folder(path, allow_pickle)
        adapter = adapter_of_folder(path)
        if adapter is not None and adapter.name != "transformers":
            module = adapter.load(path)
            source = source_of(module, str(model))  # of the weights as they are stored
            if dtype != "auto":
                module = module.to(_DTYPES[dtype])
            return LoadedModel(module.to(device).eval(), None, source)
    elif path.exists() or not may_be_hub_id(location):
        raise ConfigError(f"{path} is not a model folder or a .gguf file; check the path")
    weights: dict[str, Any] = dict(options)
    as_stored: Any = torch.float32 if gguf_file else "auto"
    if gguf_file:
        weights["quantization_config"] = transformers.GgufConfig(gguf_file=gguf_file, dequantize=True)
    else:
        weights["use_safetensors"] = None if allow_pickle else True
    wanted = _DTYPES.get(dtype, as_stored)
    stored_print: str | None = None
    unread: tuple[str, ...] = ()
    try:
        with quiet_libraries(), contextlib.ExitStack() as stack:
            if gguf_file:  # its reader draws a bar on stderr with plain tqdm, which no setting turns off
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            config = transformers.AutoConfig.from_pretrained(location, **options)
            quantised = gguf_file is not None or getattr(config, "quantization_config", None) is not None
            if gguf_file:
                unread, changes = beyond_transformers(path, config)
                if changes:
                    vars(config.get_text_config()).update(changes)
                    weights["config"] = config
            loader = transformers.AutoModelForCausalLM if gguf_file else _loader(config, trust_remote_code)
            if wanted not in (as_stored, None if gguf_file else config.dtype):
                stored = loader.from_pretrained(location, dtype=as_stored, **weights)
                vars(stored.config).pop("_model_name_or_path", None)
                stored_print = fingerprint(stored)
                del stored
            module, report = loader.from_pretrained(location, output_loading_info=True, dtype=wanted, **weights)
    except SGLPError:
        raise
    except Exception as error:
        raise _explained(model, path, error) from error
    if gguf_file:
        unread += refuse_unread_tensors(path, module)
    if unread:
        warnings.warn(f"{path.name}: not read, and taken to be without effect: {', '.join(unread)}", stacklevel=2)
    _check_complete(str(model), report, module)
    if getattr(module, "hf_quantizer", None) is None and quantised:
        # Dequantised while it was read.  Written by the names it was read by, its tensors would pass for quantised.
        vars(module).pop("_weight_conversions", None)
    # Left by the GGUF reader: a path of this machine, which would travel into every checkpoint written.
    vars(module.config).pop("_model_name_or_path", None)
    module = module.to(device).eval()
    source = source_of(module, str(model), gguf_file)
    if stored_print is not None:
        source = replace(source, fingerprint=stored_print)
    return LoadedModel(module, _load_tokenizer(path, location, options), source)


def _loader(config: Any, trusted: bool) -> Any:
    """What reads the model: its own class, or where its code came with it and may run, what its ``auto_map`` names."""
    import transformers

    named = getattr(config, "auto_map", None) or {}  # the attribute exists only where a checkpoint sets it
    if not trusted:
        return model_class(config)
    own = (getattr(config, "architectures", None) or [""])[0]
    kinds = [kind for kind in named if kind.startswith("AutoModel") and hasattr(transformers, kind)]
    meant = [kind for kind in kinds if own and str(named[kind]).endswith(f".{own}")]
    chosen = next(iter([*meant, *(kind for kind in kinds if kind == "AutoModelForCausalLM"), *kinds]), None)
    return model_class(config) if chosen is None else getattr(transformers, chosen)


def _explained(model: str | Path, path: Path, error: Exception) -> SGLPError:
    """Why transformers could not read a model, in our words."""
    what, first = f"model {str(model)!r}", _first_line(error)
    if (method := _quantised_by(path)) and not isinstance(error, PermissionError | MemoryError):
        return UnsupportedModelError(
            f"{what} is stored quantised ({method}), which cannot be read here; {first}; give the checkpoint it was "
            "quantised from"
        )
    if isinstance(error, OSError):
        return ConfigError(
            f"{what} cannot be loaded; {first}; give a checkpoint folder, a .gguf file, or a hub identifier while "
            "online"
        )
    if isinstance(error, ValueError | KeyError):
        return UnsupportedModelError(
            f"{what} cannot be loaded; {first}; check its config.json, and whether this transformers knows its "
            "model_type"
        )
    # safetensors, gguf and the shape check each raise a type of their own, some of them bare Exceptions.
    return ConfigError(
        f"{what} cannot be read; {type(error).__name__}: {first}; its files are damaged or do not belong together; get "
        "the checkpoint again"
    )


def _quantised_by(path: Path) -> str | None:
    """What a checkpoint's config.json says it was quantised by; None where it says nothing."""
    config = _io.json_of(path / "config.json", ours=False)
    stated = config.get("quantization_config") if isinstance(config, dict) else None
    return str(stated.get("quant_method", "of an unnamed kind")) if isinstance(stated, dict) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is unknown to PyTorch; pass cpu, cuda or cuda:N") from None
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices; use "
            "--device cpu"
        )
    try:
        holds = kind.type != "meta" and torch.zeros(1, device=kind).item() == 0
    except (RuntimeError, NotImplementedError, AssertionError):  # each backend has its own way to be absent
        holds = False
    if not holds:
        raise ConfigError(f"device {device!r} holds no numbers here; nothing could be computed; use --device cpu")


def _check_complete(model: str, report: dict[str, Any], module: nn.Module) -> None:
    """Refuse a checkpoint whose tensors and configuration disagree: transformers would fill the gaps at random."""
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ConfigError(
            f"model {model!r} lacks {len(missing)} tensors, first {missing[0]}; random numbers would stand in for "
            "them; get the checkpoint again"
        )
    unexpected = sorted(map(str, report["unexpected_keys"]))
    config = cast("PreTrainedModel", module).config
    # Blocks that predict further tokens are numbered on behind the last layer.  transformers reads none of them.
    counts = [getattr(config, name, None) for name in PREDICTION_HEADS]
    heads = max((count for count in counts if isinstance(count, int)), default=0)
    depth = getattr(config, "num_hidden_layers", None)
    beyond = _beyond(module, unexpected)
    excused = {name for name, (length, number) in beyond.items() if length == depth and number < heads}
    if found := [name for name in unexpected if (name in beyond or ".layers." in f".{name}") and name not in excused]:
        entry = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise ConfigError(
            f"model {model!r} has {len(found)} layer tensors its config.json does not know, first {found[0]}; layers "
            f"would be left out unnoticed; repair the entry that counts them ({entry})"
        )


def _beyond(module: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of names of tensors, those behind the last module of a list: the list's length, and how far behind it.

    A checkpoint of the bare model lacks the prefix of the whole one, or has it where the model does not.
    """
    lists = {
        path: len(each) for path, each in module.named_modules() if isinstance(each, (nn.ModuleList, nn.Sequential))
    }
    found = {}
    for name in names:
        parts = name.split(".")
        for place in (place for place, part in enumerate(parts) if place and part.isdecimal()):
            above = ".".join(parts[:place])
            lengths = [
                length
                for path, length in lists.items()
                if path == above or path.endswith(f".{above}") or above.endswith(f".{path}")
            ]
            if lengths and int(parts[place]) >= max(lengths):
                found[name] = max(lengths), int(parts[place]) - max(lengths)
                break
    return found


def _check_folder(path: Path, allow_pickle: bool) -> None:
    if (path / "adapter_config.json").is_file() and (path / "config.json").is_file():
        raise ConfigError(
            f"{path} holds an adapter (adapter_config.json) beside the model; which of the two is meant is not known; "
            "merge the adapter into the model (peft, merge_and_unload), or move its files away"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json; a Hugging Face checkpoint folder was expected; check the path")
    _check_depth(path / "config.json")
    if list(path.glob("*.safetensors")) or allow_pickle:
        return
    if list(path.glob("*.bin")) or list(path.glob("*.pt")) or list(path.glob("*.pth")):
        raise ConfigError(
            f"{path} stores its weights as pickle; loading pickle can run code; convert it to safetensors, or pass "
            "--allow-pickle if you trust its author"
        )
    raise ConfigError(f"{path} holds no *.safetensors file; the weights are missing; check the folder")


def _check_depth(file: Path) -> None:
    """Refuse a depth that no model has before a library builds so many layers."""
    config = _io.json_of(file, ours=False)
    parts = [config, *config.values()] if isinstance(config, dict) else []  # else transformers says what is wrong
    for part in parts:
        for name in DEPTHS if isinstance(part, dict) else ():
            depth = part.get(name)
            if isinstance(depth, int) and not 0 <= depth <= _DEEPEST:
                raise ConfigError(
                    f"{file} says {name}={depth}; no model has so many layers (0 to {_DEEPEST}); correct the entry"
                )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def _load_tokenizer(path: Path, location: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None when there is none: a model without one is legitimate, its users bring token ids."""
    import transformers

    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None  # asked for one, transformers would make an empty tokenizer of the family
    try:
        with quiet_libraries():
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:
        if not path.exists():
            return None  # a hub identifier; nothing says that the repository has one
        words = str(error)
        if path.is_file() and "no_vocab" in words:
            return None  # a GGUF file that says that it has none
        if "trust_remote_code" in words or "custom code" in words:
            advice = "its code came with it; pass --trust-remote-code if you trust its author"
        elif (path / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            # transformers then tries other readers, and its own words are about the last of them.
            raise ConfigError(
                f"the tokenizer of {location} cannot be read; tokenizer.model needs a package that is not installed; "
                "pip install sentencepiece protobuf"
            ) from error
        elif isinstance(error, ImportError):
            advice = "install the package it needs"
        else:
            advice = "repair its files, or work with token ids from a folder without them"
        raise ConfigError(f"the tokenizer of {location} cannot be read; {_first_line(error)}; {advice}") from error
    return tokenizer
