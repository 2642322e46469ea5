from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.protocols import GeneratingRunner, check_open_options

EVERY_FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)


def _ids(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (rows, length))


@EVERY_FAMILY
def test_prefill_and_decode_agree_with_a_forward_pass_over_everything(family: str) -> None:
    model = tiny.model(family)
    ids = _ids(2, tiny.WINDOW + 20)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    with TorchRunner(model) as runner:
        assert isinstance(runner, GeneratingRunner)
        np.testing.assert_allclose(runner.forward({"input_ids": ids})["logits"], expected, atol=1e-6)
        whole = runner.prefill(ids[:, :7], all_positions=True)
        np.testing.assert_allclose(whole, expected[:, :7], atol=1e-5)
        np.testing.assert_allclose(runner.prefill(ids[:, :7]), expected[:, 6], atol=1e-5)
        for position in range(7, ids.shape[1]):
            np.testing.assert_allclose(runner.decode(ids[:, position]), expected[:, position], atol=1e-5)


@EVERY_FAMILY
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(family: str) -> None:
    model = tiny.model(family)
    short, long = _ids(1, 5), _ids(1, 14)
    ids = np.zeros((2, 14), dtype=np.int64)
    ids[0, 9:], ids[1] = short, long
    mask = (np.arange(14) >= np.array([[9], [0]])).astype(np.int64)
    steps = _ids(2, 12)
    with TorchRunner(model) as runner:
        together = [runner.prefill(ids, mask), *(runner.decode(steps[:, k]) for k in range(12))]
        for row, alone in enumerate((short, long)):
            apart = [runner.prefill(alone), *(runner.decode(steps[row : row + 1, k]) for k in range(12))]
            for one, other in zip(together, apart, strict=True):
                np.testing.assert_allclose(one[row], other[0], atol=1e-5)


def test_decode_needs_a_prefill_first() -> None:
    with (
        TorchRunner(tiny.model("llama")) as runner,
        pytest.raises(BackendError, match=r"decode was called before prefill; .*; call prefill first"),
    ):
        runner.decode(np.array([1]))


def test_leaving_forgets_the_cache_and_restores_the_threads() -> None:
    before = torch.get_num_threads()
    runner = TorchRunner(tiny.model("llama"), threads=before + 1)
    with runner:
        assert torch.get_num_threads() == before + 1
        runner.prefill(_ids(1, 4))
    assert torch.get_num_threads() == before
    with runner, pytest.raises(BackendError, match=r"call prefill first"):
        runner.decode(np.array([1]))


def test_float32_convolves_with_all_its_bits_while_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    runner = TorchRunner(tiny.model("llama"))
    with runner, TorchRunner(tiny.model("llama")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with runner:
        pass
    assert not torch.backends.cudnn.allow_tf32


def test_half_precision_logits_come_back_as_float32() -> None:
    with TorchRunner(tiny.model("llama").to(torch.bfloat16)) as runner:
        assert runner.prefill(_ids(1, 4)).dtype == np.float32
        runner.synchronize()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 2}, "unknown option of a runner for 'onnx' 'thread'; .*did you mean 'threads'"),
        ({"threads": 0}, "threads=0 is not a positive whole number"),
        ({"threads": "two"}, "threads='two' is not a positive whole number; it counts threads; pass threads=1 or more"),
    ],
)
def test_a_wrong_option_of_open_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_open_options("onnx", options)
    assert check_open_options("onnx", {"device": "cpu", "threads": 2}) == {"device": "cpu", "threads": 2}


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_cpu() -> None:
    model, ids = tiny.model("gemma3"), _ids(2, 20)
    with TorchRunner(model) as runner:
        expected = [runner.prefill(ids), runner.decode(ids[:, 0])]
    with TorchRunner(model.to("cuda")) as runner:
        got = [runner.prefill(ids), runner.decode(ids[:, 0])]
        runner.synchronize()
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)
