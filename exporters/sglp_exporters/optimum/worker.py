"""optimum-onnx, run with the interpreter of its own environment; speaks the protocol of ``worker_loop``."""

import json
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])

import numpy as np
from worker_loop import serve

_TASK = "text-generation-with-past"
# Said by the file, and of no meaning for what is computed.
_SILENT = frozenset(
    {"architectures", "model_type", "transformers_version", "dtype", "_name_or_path", "_model_name_or_path"}
)


def export(folder: str, out: str) -> Mapping[str, Any]:
    """Write the checkpoint in ``folder`` as ONNX into ``out``, as ``optimum-cli export onnx`` does.

    The checkpoint's settings are respelled in place for the older transformers of this environment.
    """
    from optimum.exporters.onnx import main_export
    from transformers import AutoModelForCausalLM

    given = _respell(Path(folder))
    # optimum would fill a tensor that it misses at random and say so in a log that nobody reads.
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    gaps = [*report["missing_keys"], *report["unexpected_keys"], *(str(each) for each in report["mismatched_keys"])]
    if gaps:
        raise RuntimeError(
            f"transformers {metadata.version('transformers')} reads another {type(model).__name__} from the "
            f"checkpoint: {len(gaps)} tensors are missing, left over or of another shape, first {sorted(gaps)[0]}"
        )
    known = set(vars(type(model.config)()))
    del model
    main_export(folder, out, task=_TASK, device="cpu", dtype="fp32", local_files_only=True, do_validation=False)
    return {
        "optimum-onnx": metadata.version("optimum-onnx"),
        "transformers": metadata.version("transformers"),
        "torch": metadata.version("torch"),
        "not_read": sorted(given - known - _SILENT),
    }


def greedy(folder: str, prompt: list[int], steps: int) -> Mapping[str, Any]:
    """What ``ORTModelForCausalLM`` makes of the folder: the tokens it continues ``prompt`` with."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import GenerationConfig

    model = ORTModelForCausalLM.from_pretrained(folder, local_files_only=True, use_io_binding=False)
    # Without an end token: the count must not depend on what is said.
    model.generation_config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return {"tokens": np.asarray(made[0, len(prompt) :], dtype=np.int64)}


def _respell(folder: Path) -> set[str]:
    """Write what transformers 5 says by newer names also by the older ones; answers with the settings there were."""
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    given = set(settings)
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict):
        given.discard("rope_parameters")
        by_type = all(isinstance(value, dict) for value in rope.values())
        settings.update(_older_rope(rope["full_attention"] if by_type else rope))
        if by_type and "sliding_attention" in rope:
            settings["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        file.write_text(json.dumps(settings), encoding="utf-8")
    return given


def _older_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """One table of rotary settings as the three entries it used to be."""
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    if rope.get("rope_type", "default") == "default":
        older["rope_scaling"] = None
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return older


if __name__ == "__main__":
    serve({"export": export, "greedy": greedy})
