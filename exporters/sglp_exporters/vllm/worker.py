"""vLLM, run with the interpreter of its own environment; speaks the protocol of ``worker_loop``."""

import os
import sys
from collections.abc import Mapping
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process: a child of it would outlive a kill
    VLLM_LOGGING_LEVEL="WARNING",
    TRITON_F32_DEFAULT="ieee",  # float32 means all 23 bits of the mantissa; its default on a GPU is TF32
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])

import numpy as np  # after the settings above, like everything vLLM brings
from worker_loop import serve

# Tokens in a cache block: the least CPU attention takes; small, so that continuing a sequence reads from the cache.
_BLOCK = 32
_SHARE_OF_FREE = 0.9  # of the device's free memory
_state: dict[str, Any] = {}


def start(folder: str, dtype: str, max_model_len: int) -> Mapping[str, Any]:
    """Load the checkpoint; answers with what vLLM says about memory."""
    import torch
    import vllm

    share = {}
    if torch.cuda.is_available():
        # vLLM demands nine tenths of the device, where the reference model lies too while a certificate is made.
        free, total = torch.cuda.mem_get_info()
        share = {"gpu_memory_utilization": _SHARE_OF_FREE * free / total}
    llm = vllm.LLM(
        model=folder,
        dtype=dtype,
        max_model_len=max_model_len,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        enable_prefix_caching=True,
        block_size=_BLOCK,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        skip_tokenizer_init=True,
        **share,
    )
    _state["llm"] = llm
    settings = llm.llm_engine.vllm_config
    cache, model = settings.cache_config, settings.model_config
    return {
        "vllm": vllm.__version__,
        "vocab": int(model.get_vocab_size()),
        "kv_cache_tokens": int((cache.num_gpu_blocks or 0) * cache.block_size),
        "kv_block_tokens": int(cache.block_size),
    }


def logits(rows: list[list[int]], every_position: bool) -> Mapping[str, Any]:
    """Logits of every prompt position (concatenated over rows), or of each row's last position only."""
    sampling = _sampling(1, prompt_logprobs=-1 if every_position else None)
    found = []
    for answer in _generate(rows, sampling):
        last = _dense(answer.outputs[0].logprobs, 0)
        if every_position:
            # vLLM lists a prompt token's logits with the token they predict, so the first position has none.
            before = [_dense(answer.prompt_logprobs, at) for at in range(1, len(answer.prompt_token_ids))]
            found.append(np.stack([*before, last]))
        else:
            found.append(last[None])
    return {"logits": np.concatenate(found)}


def greedy(rows: list[list[int]], steps: int) -> Mapping[str, Any]:
    """vLLM's own decode loop: the tokens it picks and the logits it picked them from."""
    answers = _generate(rows, _sampling(steps))
    tokens = np.array([list(answer.outputs[0].token_ids) for answer in answers], dtype=np.int64)
    values = np.stack([[_dense(answer.outputs[0].logprobs, step) for step in range(steps)] for answer in answers])
    return {"tokens": tokens, "logits": values}


def _sampling(steps: int, prompt_logprobs: int | None = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=steps,
        ignore_eos=True,  # and no min_tokens, which would forbid the end's token instead of going on past it
        logprobs=-1,
        prompt_logprobs=prompt_logprobs,
        flat_logprobs=True,
        detokenize=False,
    )


def _generate(rows: list[list[int]], sampling: Any) -> Any:
    return _state["llm"].generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)


def _dense(flat: Any, position: int) -> np.ndarray:
    """One position's logits in the order of the vocabulary; vLLM lists the picked token twice."""
    part = slice(flat.start_indices[position], flat.end_indices[position])
    dense = np.full(max(flat.token_ids[part]) + 1, np.nan, dtype=np.float32)
    dense[flat.token_ids[part]] = flat.logprobs[part]
    return dense


if __name__ == "__main__":
    serve({"start": start, "logits": logits, "greedy": greedy})
