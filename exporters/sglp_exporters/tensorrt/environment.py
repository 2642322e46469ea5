"""The environment of ModelOpt, which makes int8 graphs for TensorRT."""

from __future__ import annotations

from sglp_deploy.protocols import EnvironmentSpec

MODELOPT = EnvironmentSpec(
    name="modelopt",
    why="ModelOpt pins onnx below 1.22 and ONNX Runtime 1.24",
    # Its extra "onnx" asks for onnxruntime-gpu and cupy, a gigabyte that calibration on a CPU never loads.
    install=(
        ("torch==2.13.0",),
        (
            "nvidia-modelopt==0.47.0",
            "onnx==1.21.0",
            "onnxruntime==1.24.4",
            "onnx-graphsurgeon>=0.6.1",
            "onnxconverter-common==1.16.0",
            "onnxscript",
            "onnxslim>=0.1.76",
            "polygraphy>=0.53.4",
            "lief",
            "cppimport",
            "ml_dtypes",
            "requests",
        ),
    ),
    probe="import modelopt.onnx.quantization",
    size="1.5 GB",
)
