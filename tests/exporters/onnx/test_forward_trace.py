"""A forward graph takes the model's inputs by name, at any size that may vary, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from sglp_deploy.errors import BackendError
from sglp_exporters.onnx.forward_trace import trace_forward


class _Plain(nn.Module):
    """A network that is no transformers model: one image tensor in, one tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 32, stride=32)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores, shape (batch, 5)."""
        scores: torch.Tensor = self.head(self.stem(x).mean((2, 3)))
        return scores


class _Running(_Plain):
    """Loops over the rows, so tracing writes down as many rows as it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As of the parent."""
        return torch.stack([super(_Running, self).forward(row[None])[0] for row in x])


def _shapes(values: list[ir.Value]) -> dict[str, list[str]]:
    return {value.name or "": [str(size) for size in value.shape or ()] for value in values}


def test_a_plain_network_is_traced_with_its_own_input_name_and_any_number_of_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Plain().eval()
    program = trace_forward(model)
    assert _shapes(list(program.graph.inputs)) == {"x": ["batch", "3", "224", "224"]}
    assert _shapes(list(program.graph.outputs)) == {"output": ["batch", "5"]}
    ir.save(program, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 224, 224)
    with torch.no_grad():
        wanted = model(images).numpy()
    np.testing.assert_allclose(session.run(None, {"x": images.numpy()})[0], wanted, atol=1e-5)


def test_a_number_of_rows_that_was_burnt_in_is_refused() -> None:
    with pytest.raises(
        BackendError, match=r"tracing unrolled a loop: axis 0 of output would be 2 whatever the graph is given; "
    ):
        trace_forward(_Running().eval())
