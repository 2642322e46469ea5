"""The loss made in pieces is the one a textbook writes, and so is its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from sglp_deploy.healing.losses import Speaker, Weighting, distilled, nats
from sglp_deploy.tasks import task

ROWS = np.random.default_rng(3).integers(0, 250, size=(3, 90))  # 267 predictions: two whole pieces and a part of one


def speakers(family: str = "llama", **changes: Any) -> tuple[Speaker, Speaker]:
    """Student and teacher; what is trained is the student's layers."""
    student, teacher = tiny.model(family, seed=1, **changes), tiny.model(family, seed=2, **changes)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".layers." in name)
    return Speaker(student, torch.float32), Speaker(teacher, torch.float32)


def by_the_book(student: Any, teacher: Any, ids: torch.Tensor, how: Weighting) -> torch.Tensor:
    """sum of (1 - c) T² sum_v p_v (log p_v - log q_v) - c log q_label, from whole float64 logits."""
    q = student(input_ids=ids).logits[:, :-1].double()
    with torch.no_grad():
        p = teacher(input_ids=ids).logits[:, :-1].double()
    heated_p, heated_q = (p / how.temperature).softmax(-1), (q / how.temperature).softmax(-1)
    kl = (heated_p * (heated_p.log() - heated_q.log())).sum()
    labels = torch.nn.functional.one_hot(ids[:, 1:], q.shape[-1]).double()
    cross = -(labels * q.softmax(-1).log()).sum()
    return (1 - how.ce) * how.temperature**2 * kl + how.ce * cross


@pytest.mark.parametrize("how", [Weighting(0.3), Weighting(0.0), Weighting(1.0), Weighting(0.4, 2.0)])
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen3", {}), ("gemma3", {"final_logit_softcapping": 5.0})]
)
def test_loss_and_gradient_are_those_of_whole_logits(family: str, changes: dict[str, Any], how: Weighting) -> None:
    student, teacher = speakers(family, **changes)
    assert student.split == (not changes)
    ids = torch.from_numpy(ROWS)
    expected = by_the_book(student.module, teacher.module, ids, how)
    expected.backward()
    wanted = {name: one.grad for name, one in student.module.named_parameters() if one.grad is not None}
    student.module.zero_grad()
    with torch.no_grad():
        taught = teacher.states(ids)
    found = distilled(student, student.states(ids), teacher, taught, ids, how)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len(wanted) > 20
    for name, gradient in wanted.items():
        own = student.module.get_parameter(name).grad
        assert own is not None
        torch.testing.assert_close(own, gradient, rtol=2e-3, atol=2e-4 * float(gradient.abs().max()))


def test_a_student_that_is_its_teacher_has_no_kl_and_no_gradient_of_it() -> None:
    _, teacher = speakers()
    student = Speaker(tiny.model(seed=2), torch.float32)
    ids = torch.from_numpy(ROWS)
    with torch.no_grad():
        taught = teacher.states(ids)
    states = student.states(ids)
    loss = distilled(student, states, teacher, taught, ids, Weighting(0.0))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-3)
    (gradient,) = torch.autograd.grad(loss, states)
    assert float(gradient.abs().max()) < 1e-5


def test_a_trained_head_gets_its_gradient_from_autograd() -> None:
    model = tiny.model("llama-untied", seed=1)
    student, teacher = Speaker(model, torch.float32, trains_head=True), speakers("llama-untied")[1]
    assert not student.split
    ids = torch.from_numpy(ROWS)
    with torch.no_grad():
        taught = teacher.states(ids)
    # The teacher's states are what its head is given, the student's are logits.
    distilled(student, student.states(ids), teacher, taught, ids, Weighting(0.3)).backward()
    gradient = model.get_output_embeddings().weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


def test_bfloat16_products_give_nearly_the_same_loss_and_leave_weights_float32() -> None:
    student, teacher = speakers()
    coarse, coarse_teacher = (Speaker(one.module, torch.bfloat16) for one in (student, teacher))
    ids = torch.from_numpy(ROWS)
    with torch.no_grad():
        taught = teacher.states(ids), coarse_teacher.states(ids)
    fine = distilled(student, student.states(ids), teacher, taught[0], ids, Weighting(0.3))
    found = distilled(coarse, coarse.states(ids), coarse_teacher, taught[1], ids, Weighting(0.3))
    assert float(found.detach()) == pytest.approx(float(fine.detach()), rel=0.02)
    assert float(found.detach()) != float(fine.detach())
    found.backward()
    gradients = [one.grad for one in student.module.parameters() if one.grad is not None]
    assert {one.dtype for one in gradients} == {torch.float32}


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gemma3", {"final_logit_softcapping": 5.0})])
def test_the_cross_entropy_of_rows_is_the_task_s_loss(family: str, changes: dict[str, Any]) -> None:
    student, _ = speakers(family, **changes)
    mean, predictions = task("language").loss(student.module, (ROWS, np.ones_like(ROWS)))
    found = nats(student, ROWS, batch_size=2)
    assert found.shape == (3,)
    assert found.sum() / predictions == pytest.approx(float(mean.detach()), rel=1e-5)


def test_a_loss_beyond_all_numbers_is_infinite_and_no_nan() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    assert [math.isinf(each) for each in nats(Speaker(model, torch.float32), ROWS, batch_size=4)] == [True] * 3
