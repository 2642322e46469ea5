"""Talk to a worker in another interpreter: JSON lines one way and the other, arrays as files, and no shared memory.

The worker's own standard output and error go to a log, because libraries print there.  Answers come through a pipe of
their own.  A worker that dies, hangs or answers rubbish becomes one :class:`BackendError` with its last words.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.errors import BackendError
from sglp_deploy.isolation.children import WATCHED, end_group

# Names the folder that holds worker_loop.py, for the script to put on its path.
LOOP_VARIABLE = "SGLP_WORKER_LOOP"
_LOOP_FOLDER = Path(__file__).with_name("worker_side")
_LAST_LINES = 12
_LONGEST_LINE = 64 << 20


class Worker:
    """One running worker; a context manager that ends it, with its children, whatever happens.

    Args:
        python: The interpreter to run it with.
        script: The worker's file; see :mod:`sglp_deploy.isolation.worker_side.worker_loop` for what it must do.
        name: What messages call it.
        timeout_s: How long one request may take.
        environment: Variables added to ours.
    """

    def __init__(
        self,
        python: Path,
        script: Path,
        *,
        name: str,
        timeout_s: float = 600.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [str(python), str(script)]
        self._name = name
        self._timeout_s = timeout_s
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = ExitStack()
        self._scratch: Path | None = None
        self._answers = -1
        self._buffer = b""
        self._arrays = 0

    def __enter__(self) -> Worker:
        """Start the process.

        Raises:
            BackendError: If the interpreter cannot be started.
        """
        scratch = self._scratch = self._cleanup.enter_context(_io.scratch("worker"))
        read, write = os.pipe()
        # Our packages must not leak into the other interpreter: it has its own torch.
        base = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")} | WATCHED
        try:
            with (scratch / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._command, str(write)],
                    cwd=scratch,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write,),
                    # Safe path: the modules beside a worker's script are ours, and their names would shadow others.
                    env={
                        **base,
                        **WATCHED,
                        "PYTHONSAFEPATH": "1",
                        LOOP_VARIABLE: str(_LOOP_FOLDER),
                        **self._environment,
                    },
                    start_new_session=True,
                )
        except OSError as error:
            os.close(read)
            self._cleanup.close()
            raise BackendError(f"the {self._name} worker cannot be started; {error}; check the interpreter") from error
        finally:
            os.close(write)
        self._answers = read
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process group and delete the exchanged files."""
        self._kill()
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1
        self._scratch = None
        self._cleanup.close()

    def ask(self, request: str, *, timeout_s: float | None = None, **values: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; numpy arrays travel as files in both directions.

        Raises:
            BackendError: If the worker raises, dies, hangs or answers rubbish; the message ends with its last words.
        """
        process = self._process
        if process is None or process.stdin is None:
            raise BackendError(f"the {self._name} worker is not running; use it as a context manager")
        message = {"request": request, **{key: self._pack(value) for key, value in values.items()}}
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._died(request) from None
        line = self._read_line(request, self._timeout_s if timeout_s is None else timeout_s)
        try:
            answer = json.loads(line)
            if not isinstance(answer, dict):
                raise ValueError(f"{type(answer).__name__} is no JSON object")  # as any other rubbish
            if "error" in answer:
                raise BackendError(f"the {self._name} worker failed on {request!r}; {answer['error']}{self._tail()}")
            return {key: self._unpack(value) for key, value in answer.items()}
        except (ValueError, OSError) as error:
            raise BackendError(
                f"the {self._name} worker answered {request!r} with rubbish; {error}; report this{self._tail()}"
            ) from error

    def _read_line(self, request: str, timeout_s: float) -> bytes:
        until = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                self._kill()
                raise BackendError(
                    f"the {self._name} worker gave no answer to {request!r} in {timeout_s:g} s and was stopped; it "
                    f"hangs, or the work is too large for this machine{self._tail()}"
                )
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise self._died(request)
            self._buffer += piece
            if len(self._buffer) > _LONGEST_LINE:
                self._kill()
                raise BackendError(f"the {self._name} worker answered {request!r} without end; report this")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, request: str) -> BackendError:
        assert self._process is not None
        status = self._process.wait()
        self._kill()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        hint = "; the machine may be out of memory" if status == -signal.SIGKILL else ""
        return BackendError(f"the {self._name} worker {how} on {request!r}{hint}{self._tail()}")

    def _pack(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        assert self._scratch is not None
        self._arrays += 1
        path = self._scratch / f"in-{self._arrays}.npy"
        np.save(path, value, allow_pickle=False)
        return {"npy": str(path)}

    def _unpack(self, value: Any) -> Any:
        if not (isinstance(value, dict) and set(value) == {"npy"}):
            return value
        assert self._scratch is not None
        path = Path(value["npy"]).resolve()
        if not path.is_relative_to(self._scratch.resolve()):
            raise ValueError(f"{value['npy']} lies outside the exchange folder")
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        path.unlink()
        return array

    def _tail(self) -> str:
        if self._scratch is None:
            return ""
        text = (self._scratch / "log").read_text(encoding="utf-8", errors="replace").strip()
        lines = text.splitlines()[-_LAST_LINES:]
        return "\n  its last lines:\n    " + "\n    ".join(lines) if lines else ""

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        end_group(process)
        if process.stdin is not None:
            try:
                process.stdin.close()
            except BrokenPipeError:
                return  # it died with a request unread
