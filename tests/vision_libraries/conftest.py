"""Makes torchvision importable for these tests beside a torch it was not built for, in this process only.

``make test-vision`` runs them in a process of their own: a torchvision whose compiled operators belong to another build
of torch (as its wheel does, beside torch's CPU build) fails on import, and takes transformers with it.  The models
tested here call none of those operators, so declaring the two that torchvision asks for by name is enough.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

_DECLARED: list[torch.library.Library] = []  # an operator lives as long as the library object that declares it


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # the tests skip themselves
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        importlib.import_module("torchvision")


_import_torchvision()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model asked for with trained weights would be downloaded; nothing here may."""

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise AssertionError("a test tried to download weights")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
