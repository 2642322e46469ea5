"""The environment that ExecuTorch lowers and runs programs in."""

from __future__ import annotations

from sglp_deploy.protocols import EnvironmentSpec

ENVIRONMENT = EnvironmentSpec(
    name="executorch",
    why="ExecuTorch asks for coremltools, pandas, scikit-learn and more that lowering to XNNPACK never loads",
    # Without what it asks for: what its XNNPACK side and its runtime import is listed here.
    install=(
        ("torch==2.13.0", "numpy>=2,<3", "flatbuffers", "packaging", "pyyaml", "ruamel.yaml", "tabulate"),
        ("--no-deps", "executorch==1.5.1", "torchao==0.18.0"),
    ),
    probe=(
        "import executorch.runtime, executorch.exir; "
        "from executorch.backends.xnnpack.partition import xnnpack_partitioner"
    ),
    size="1.2 GB",
)
