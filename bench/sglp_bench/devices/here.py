"""This machine: starts the worker of one block and turns every way it can fail into one readable error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sglp_bench.devices.environment import collect_environment, thread_variables
from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, BenchmarkError
from sglp_deploy.isolation.children import WATCHED, end_group

_STDERR_LINES = 12


class Here:
    """Each block in a fresh process of this machine (:class:`sglp_bench.devices.device.Device`).

    Attributes:
        name: "here".
    """

    name = "here"

    def environment(self, *, device: str, threads: int | None, packages: Iterable[str] = ()) -> dict[str, Any]:
        """Facts about this machine and this interpreter."""
        return collect_environment(device=device, threads=threads, packages=packages)

    def run(self, spec: Mapping[str, Any], *, label: str, threads: int | None, timeout_s: float) -> dict[str, Any]:
        """See :func:`run_worker`."""
        told = {**spec, "pythonpath_before": os.environ.get("PYTHONPATH")}  # the worker puts it back
        return run_worker(told, label=label, threads=threads, timeout_s=timeout_s)


HERE = Here()


def run_worker(spec: Mapping[str, Any], *, label: str, threads: int | None, timeout_s: float) -> dict[str, Any]:
    """Run one block in a fresh process and return its answer.

    Args:
        spec: See :func:`sglp_bench.measure.worker.run_block`, and ``pythonpath_before``.
        label: The arm, for messages.
        threads: Exported as the thread variables before the process starts: most libraries read them once, at import.
        timeout_s: The process and its children are killed after this long.

    Raises:
        BenchmarkError: If the process fails, is killed, takes too long, or leaves no readable answer; the message
            ends with the last lines of its standard error.
    """
    with _io.scratch("block") as folder:
        _io.write_json(folder / "spec.json", spec)
        # The child imports what the parent imports, from a checkout as well as from an installation.
        environment = {
            **os.environ,
            **thread_variables(threads),
            **WATCHED,
            "PYTHONPATH": os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path),
        }
        command = [sys.executable, "-P", "-m", "sglp_bench.measure.worker", "spec.json", "answer.json"]
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.PIPE,  # nothing is written; it closes when we end, and the worker then ends too
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,  # so that its own children can be killed with it
            )
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise BenchmarkError(
                    f"the worker of arm {label!r} gave no answer in {timeout_s:g} s; it hangs, or the workload is too "
                    f"large for this machine; pass a larger timeout_s or a smaller workload{_tail(folder)}"
                ) from None
            finally:
                end_group(process)
                assert process.stdin is not None
                process.stdin.close()
        if status != 0:
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
            hint = "; the machine may be out of memory" if status == -signal.SIGKILL else ""
            raise BenchmarkError(
                f"the worker of arm {label!r} {how}{hint}; blocks measured before are kept; "
                f"correct the cause and run the same command again{_tail(folder)}"
            )
        try:
            answer = _io.read_json(folder / "answer.json", "block")
        except ArtifactError as error:
            raise BenchmarkError(
                f"the worker of arm {label!r} ended without a readable answer; {error}; "
                f"check what its exporter writes or calls (os._exit?){_tail(folder)}"
            ) from error
    return answer


def _tail(folder: Path) -> str:
    lines = (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_STDERR_LINES:]
    return "\n  its last lines:\n    " + "\n    ".join(lines) if lines else ""
