"""The environment that optimum-onnx exports in."""

from __future__ import annotations

from sglp_deploy.protocols import EnvironmentSpec

ENVIRONMENT = EnvironmentSpec(
    name="optimum",
    why="optimum-onnx pins transformers below 4.58, ours is 5",
    install=(
        ("torch==2.13.0",),
        # accelerate: without it optimum writes a tied embedding twice.
        ("optimum-onnx[onnxruntime]==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "accelerate>=1.10,<2"),
    ),
    probe="import optimum.exporters.onnx, optimum.onnxruntime",
    size="1.3 GB",
)
