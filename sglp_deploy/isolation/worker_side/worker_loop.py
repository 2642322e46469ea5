"""The worker's side of :mod:`sglp_deploy.isolation.workers`; needs numpy only, and is copied or imported by path.

A worker script imports :func:`serve` and passes functions by request name.  It runs in another interpreter, which has
none of our packages.  So this file imports nothing of ours.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import parent_watch


def serve(requests: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """Answer requests from standard input until it closes.

    Args:
        requests: Name of a request to the function that answers it; keyword arguments in, a mapping out.  Numpy arrays
            may stand in both.
    """
    parent_watch.end_with_parent()
    answers = os.fdopen(int(sys.argv[1]), "w")
    folder = os.getcwd()
    for line in sys.stdin:
        try:
            message = json.loads(line)
            name = message.pop("request")
            found = requests[name](**{key: _load(value) for key, value in message.items()})
            answer = {key: _store(value, folder) for key, value in found.items()}
        except Exception as error:  # noqa: BLE001  # whatever it is, the parent is told in words
            traceback.print_exc()
            words = str(error).strip().splitlines() or ["no message"]
            answer = {"error": f"{type(error).__name__}: {words[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"npy"}:
        array = np.load(value["npy"], allow_pickle=False)
        os.unlink(value["npy"])
        return array
    return value


def _store(value: Any, folder: str) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    handle, path = tempfile.mkstemp(dir=folder, prefix="out-", suffix=".npy")
    with os.fdopen(handle, "wb") as stream:
        np.save(stream, value, allow_pickle=False)
    return {"npy": path}
