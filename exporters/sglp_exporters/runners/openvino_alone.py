"""OpenVINO without its sender of usage data: it tells Google Analytics when it is imported, and what it reads."""

from __future__ import annotations

import os
import sys
from typing import Any, cast

_SENDER = "openvino_telemetry"


def load_openvino() -> Any:
    """The module ``openvino``; imported without its sender unless ``DO_NOT_TRACK`` is 0.

    There is no variable that turns the sender off.  Where its package is missing, OpenVINO has a stub that sends
    nothing; so it is made to be missing while OpenVINO is imported.  Where somebody has imported either of them before,
    nothing is changed.
    """
    modules = cast("dict[str, Any]", sys.modules)
    hidden = os.environ.get("DO_NOT_TRACK", "1") != "0" and not {"openvino", _SENDER} & modules.keys()
    if hidden:
        modules[_SENDER] = None
    try:
        import openvino
    finally:
        if hidden:
            del modules[_SENDER]
    return openvino
