"""ExecuTorch programs as runners: the runtime lives in a worker process, because it brings a torch of its own.

Nothing here may import torch: a benchmark's worker comes this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BackendError, ConfigError
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.workers import Worker
from sglp_exporters.executorch.environment import ENVIRONMENT
from sglp_exporters.runners.rows import RowsRunner

MODEL_FILE = "model.pte"
WORKER = Path(__file__).with_name("worker.py")
_BACKEND = "XnnpackBackend"
_START_TIMEOUT_S = 900.0
# torch's numbers for element types, as the runtime gives them.
_SCALAR_TYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool"}
Self = TypeVar("Self", bound="_ProgramRunner")


def python() -> Path:
    """An interpreter that has ExecuTorch: our own if it does, else that of the environment.

    Raises:
        MissingDependencyError: If there is neither; the message says how to make the environment.
    """
    import os
    import sys

    if not os.environ.get(environments.variable(ENVIRONMENT.name)) and _have_executorch():
        return Path(sys.executable)
    return environments.interpreter(ENVIRONMENT)


def _have_executorch() -> bool:
    """Whether it is installed; any folder called "executorch" in the working directory looks like the package."""
    try:
        return find_spec("executorch.runtime") is not None
    except ModuleNotFoundError:
        return False


class _ProgramRunner:
    """Starts the worker, loads the program and refuses one that is not what the manifest says."""

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        if device != "cpu":
            raise ConfigError(
                f"executorch artifacts are lowered for XNNPACK, which runs on the cpu and not on {device!r}; a number "
                "taken there would be mislabelled; pass --device cpu"
            )
        self._artifact = artifact
        self._threads = threads
        self._worker: Worker | None = None
        self._shared: NDArray[np.float32] | None = None
        self.description = "ExecuTorch, XNNPACK"

    def __enter__(self: Self) -> Self:
        """Start the worker and load the program.

        Raises:
            MissingDependencyError: If no interpreter here has ExecuTorch.
            BackendError: If the runtime cannot load the program or has no XNNPACK.
            ArtifactError: If the program is not the one the manifest describes.
        """
        worker = Worker(python(), WORKER, name="ExecuTorch")
        worker.__enter__()
        try:
            file = str((self._artifact.path / MODEL_FILE).resolve())
            facts = worker.ask("start", timeout_s=_START_TIMEOUT_S, file=file, threads=self._threads)
            check_program(self._artifact, facts)
            self._shared = np.memmap(facts["shared"], dtype=np.float32, mode="r")
        except BaseException:
            worker.__exit__(None, None, None)
            raise
        self._worker = worker
        self.description = (
            f"ExecuTorch {facts['versions']['executorch']}, XNNPACK, {facts['threads']} "
            f"thread{'s' if facts['threads'] > 1 else ''}, rows one after another"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the worker."""
        worker, self._worker, self._shared = self._worker, None, None
        if worker is not None:
            worker.__exit__(kind, error, trace)

    def synchronize(self) -> None:
        """Calls return when results exist."""

    def _ask(self, request: str, **values: Any) -> dict[str, Any]:
        if self._worker is None:
            raise BackendError("the runner is not active; its program is loaded by 'with'; use it as a context manager")
        return self._worker.ask(request, **values)


class ExecuTorchRunner(RowsRunner, _ProgramRunner):
    """A decoder whose cache lies in the program: one program for each row, given without its padding.

    Args:
        artifact: An ``executorch`` artifact of a decoder.
        device: "cpu".
        threads: Threads of XNNPACK, or None for ExecuTorch's choice.
    """

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(artifact, device, threads)
        self._lengths: list[int] = []

    def forget_rows(self) -> None:
        """See :class:`RowsRunner`."""
        super().forget_rows()
        self._lengths = []

    def start_rows(self, rows: list[list[int]], *, every_position: bool) -> NDArray[np.float32]:
        """See :class:`RowsRunner`."""
        for row in rows:
            self._check_length(len(row))
        found = self._logits("prefill", rows=rows, every_position=every_position)
        self._lengths = [len(row) for row in rows]
        return found

    def continue_rows(self, tokens: list[int]) -> NDArray[np.float32]:
        """See :class:`RowsRunner`."""
        self._lengths = [length + 1 for length in self._lengths]
        self._check_length(max(self._lengths))
        return self._logits("decode", tokens=tokens)

    def _logits(self, request: str, **values: Any) -> NDArray[np.float32]:
        """The answer's logits, which lie in memory shared with the worker when they are few."""
        answer = self._ask(request, **values)
        if "shape" not in answer:
            return cast("NDArray[np.float32]", answer["logits"])
        assert self._shared is not None
        size = int(np.prod(answer["shape"]))
        return np.array(self._shared[:size]).reshape(answer["shape"])

    def _check_length(self, tokens: int) -> None:
        most = int(self._artifact.details["max_tokens"])
        if not 1 <= tokens <= most:
            raise BackendError(
                f"a sequence of {tokens} tokens does not fit a program with room for 1 to {most}; its cache has a "
                f"fixed size; export it with max_tokens={max(tokens, 1)} or more"
            )


class ExecuTorchForwardRunner(_ProgramRunner):
    """A program without a cache, for one row; rows run one after another.

    Args:
        artifact: An ``executorch`` artifact whose interface is "forward".
        device: "cpu".
        threads: Threads of XNNPACK, or None for ExecuTorch's choice.
    """

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The main output for all rows.

        Raises:
            BackendError: If an input is missing, left over, or of a size the program has no room for.
        """
        specs = {spec.name: spec for spec in self._artifact.inputs}
        if set(inputs) != set(specs):
            raise BackendError(
                f"the program takes {', '.join(specs)}, it was given {', '.join(sorted(inputs)) or 'nothing'}; pass "
                "exactly these"
            )
        arrays = {name: np.ascontiguousarray(inputs[name], dtype=spec.dtype) for name, spec in specs.items()}
        most = int(self._artifact.details.get("max_tokens") or 0)
        for name, spec in specs.items():
            got = arrays[name].shape
            fits = len(got) == len(spec.shape) and all(
                isinstance(size, str) or size == has for size, has in zip(spec.shape, got, strict=True)
            )
            if not fits or ("sequence" in spec.shape and not 1 <= got[1] <= most):
                limit = f" with at most {most} tokens" if most else ""
                raise BackendError(
                    f"{name} has shape {got}, the program takes {list(spec.shape)}{limit}; its sizes are fixed; give "
                    "it that, or export it again"
                )
        if len({len(array) for array in arrays.values()}) > 1:
            raise BackendError(
                f"the inputs {', '.join(arrays)} have different numbers of rows; give all of them as many"
            )
        (output,) = self._artifact.outputs
        return {output.name: self._ask("forward", names=list(arrays), **arrays)["output"]}


def check_program(artifact: ExportArtifact, facts: Mapping[str, Any]) -> None:
    """Refuse a program whose inputs, outputs or cache are not the ones in the manifest.

    Args:
        artifact: What the manifest says, under ``details["program"]``.
        facts: What the runtime says: ``inputs``, ``outputs`` and ``cache``, each a list of sizes and element types.

    Raises:
        BackendError: If the runtime has no XNNPACK.
        ArtifactError: Naming the first tensor that differs.
    """
    if _BACKEND not in facts["backends"]:
        raise BackendError(
            f"this ExecuTorch has no {_BACKEND}, it has {', '.join(facts['backends']) or 'no backend'}; what it runs "
            f"would be slow or fail; make the environment again: sglp-deploy env create {ENVIRONMENT.name} --force"
        )
    for kind, wanted in artifact.details["program"].items():
        found = [described(tensor) for tensor in facts[kind]]
        for index in range(max(len(wanted), len(found))):
            says, has = (part[index] if index < len(part) else "nothing" for part in (wanted, found))
            if says != has:
                raise ArtifactError(
                    f"the program's {kind} tensor {index} is {has}, the manifest says {says}; it is another program; "
                    "export it again"
                )


def described(tensor: Mapping[str, Any]) -> str:
    """A tensor of the program in words, as manifests keep it: "float32 [1, 2, 512, 64]"."""
    number = int(tensor["scalar_type"])
    return f"{_SCALAR_TYPES.get(number, f'type {number}')} {list(tensor['sizes'])}"
