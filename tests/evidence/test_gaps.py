"""Repaired gaps against an oracle in numpy, and what must hold for families that cannot be repaired."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import zoo
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.gaps import GapMeter
from sglp_deploy.evidence.streams import HELD_OUT_EVERY
from sglp_deploy.evidence.text import CalibrationSet, TokenBatches
from sglp_deploy.materialize import materialize
from sglp_deploy.models import layer_stack
from sglp_deploy.tasks.language import LanguageTask

TASK = LanguageTask()
RIDGES = (1e-3, 1e-2, 1e-1)


def rows(module: nn.Module, tokens: int = 2048) -> TokenBatches:
    """Built-in text for a tiny model."""
    del module
    return CalibrationSet.builtin(max_tokens=tokens, sequence_length=64).encode(tiny.tokenizer())


def predictions(module: nn.Module, batches: list[object]) -> torch.Tensor:
    """Log-probabilities of every prediction on the held-out minibatches, float64."""
    with torch.inference_mode():
        found = [TASK.logits(module, each) for each in batches[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]]
    return torch.cat(found).double().log_softmax(-1)


def divergence(dense: nn.Module, pruned: nn.Module, batches: list[object]) -> float:
    """Mean KL divergence, nats per prediction."""
    said, meant = predictions(pruned, batches), predictions(dense, batches)
    return float(torch.nn.functional.kl_div(said, meant, log_target=True, reduction="batchmean"))


def without(module: nn.Module, drop: tuple[int, ...]) -> nn.Module:
    """The model with fewer layers, weights of its own."""
    n_layers = layer_stack(module).n_layers
    keep = tuple(index for index in range(n_layers) if index not in drop)
    return copy.deepcopy(materialize(module, tiny.plan_for(module, keep), tiny.source(module)).module)


def hidden_states(module: nn.Module, batch: object) -> list[np.ndarray]:
    """What each layer is given and the last one gives, rows of tokens, by hooks of this test's own."""
    seen: list[np.ndarray] = []
    stack = layer_stack(module)
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, a, k: seen.append((a[0] if a else k["hidden_states"]).double().numpy()), with_kwargs=True
        )
        for layer in stack.layers
    ]
    handles.append(
        stack.layers[-1].register_forward_hook(
            lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out).double().numpy())
        )
    )
    with torch.inference_mode():
        TASK.loss(module, batch)
    for handle in handles:
        handle.remove()
    return [each.reshape(-1, each.shape[-1]) for each in seen]


def test_a_gap_costs_what_numpy_and_a_model_with_fewer_layers_say() -> None:
    module = tiny.loaded("llama").module
    batches = list(rows(module))
    start, length = 2, 2
    projection = f"{layer_stack(module).names[start - 1]}.mlp.down_proj"
    sums = {}
    for part in ("fitted", "held out"):
        x, y, w = [], [], []
        for index, batch in enumerate(batches):
            if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) != (part == "held out"):
                continue
            seen: list[tuple[np.ndarray, np.ndarray]] = []
            handle = module.get_submodule(projection).register_forward_hook(
                lambda _m, a, out, seen=seen: seen.append((a[0].double().numpy(), out.double().numpy()))
            )
            states = hidden_states(module, batch)
            handle.remove()
            valid = TASK.valid(batch).reshape(-1)
            inputs, out = (each.reshape(-1, each.shape[-1])[valid] for each in seen[0])
            rest = states[start][valid] - out
            x.append(inputs)
            y.append(states[start + length][valid] - rest)
            w.append(1 / (states[start + length][valid] ** 2).mean(-1))
        root = np.sqrt(np.concatenate(w))[:, None]
        sums[part] = (np.concatenate(x) * root, np.concatenate(y) * root)
    old = module.get_submodule(projection).weight.detach().double().numpy().T
    x, y = sums["fitted"]
    gram = x.T @ x
    found = []
    for ridge in RIDGES:
        left = gram + ridge * np.diag(gram).mean() * np.eye(len(gram))
        weights = old + np.linalg.solve(left, x.T @ y - gram @ old)
        found.append((float(((sums["held out"][0] @ weights - sums["held out"][1]) ** 2).sum()), weights))
    weights = min(found, key=lambda each: each[0])[1]
    pruned = without(module, (2, 3))
    with torch.no_grad():
        pruned.get_submodule(projection).weight.copy_(torch.from_numpy(weights.T))
    wanted = divergence(module, pruned, batches)
    meter = GapMeter(module, layer_stack(module), TASK, batches)
    (chained,) = meter.chained([(2, 3)])
    assert chained == pytest.approx(wanted, rel=1e-2)
    unrepaired = divergence(module, without(module, (2, 3)), batches)
    assert abs(unrepaired - wanted) > 0.05 * wanted  # or this test could not tell


def test_single_gaps_of_one_layer_equal_chains_of_one_gap() -> None:
    module = tiny.loaded("llama").module
    batches = list(rows(module))
    meter = GapMeter(module, layer_stack(module), TASK, batches)
    found = meter.damage(1)
    chains = meter.chained([(layer,) for layer in range(1, found.values.shape[0])])
    np.testing.assert_allclose(found.values[1:, 0], chains, rtol=1e-2)
    assert found.judged.all()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_gaps_of_other_families_are_judged_and_the_front_as_it_is(family: str) -> None:
    if family in tiny.FAMILIES:
        module = tiny.loaded(family).module
    else:
        module = next(each for each in zoo.specimens() if each.name == family).build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batches = list(rows(module))
    found = GapMeter(module, layer_stack(module), TASK, batches).damage(2)
    assert np.isfinite(found.values[:-1]).all()
    assert np.isinf(found.values[-1, 1])
    # Nothing stands before the first layers that could be fitted.
    front = divergence(module, without(module, (0,)), batches)
    assert found.values[0, 0] == pytest.approx(front, rel=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_plan_says_what_it_cost_and_is_the_same_again() -> None:
    loaded = tiny.loaded("llama")
    calibration = CalibrationSet.builtin(max_tokens=2048, sequence_length=64)
    compressor = Compressor(loaded, calibration=calibration)
    plan = compressor.plan(drop=2, method="auto", judged=4)
    assert plan.calibration is not None
    assert 0 < plan.calibration["forward_passes"] < 100
    assert len(plan.drop) == 2
    other = Compressor(loaded, calibration=calibration)
    other.plan(drop=1, method="auto")
    assert other.plan(drop=2, method="auto", judged=4).digest() == plan.digest()


def test_one_minibatch_is_too_few() -> None:
    module = tiny.loaded("llama").module
    batches = list(rows(module))[:1]
    with pytest.raises(CalibrationError, match="judged on others"):
        GapMeter(module, layer_stack(module), TASK, batches)
