"""Greedy decoding in vLLM, run with vLLM's own interpreter:  vllm_worker.py FOLDER PROMPTS.json STEPS OUT.json."""

import json
import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1"
)


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, prompts, steps, out = sys.argv[1:]
    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=int(steps), ignore_eos=True, logprobs=1)
    with open(prompts) as stream:
        requests = [{"prompt_token_ids": ids} for ids in json.load(stream)]
    answers = []
    for answer in llm.generate(requests, sampling):
        best = answer.outputs[0]
        answers.append(
            {
                "tokens": list(best.token_ids),
                "logprobs": [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)],
            }
        )
    with open(out, "w") as stream:
        json.dump(answers, stream)


if __name__ == "__main__":
    main()
