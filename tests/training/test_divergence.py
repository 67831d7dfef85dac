"""The divergence of logits, a few tokens at a time, against its definition."""

import pytest
import torch

from mhmoe.training import divergence as module
from mhmoe.training.divergence import divergence


def logits(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(seed))).to(dtype)


def by_definition(student, teacher, counted, temperature) -> torch.Tensor:
    """Of all tokens at once, in float64."""
    own, other = ((both[counted].double() / temperature).log_softmax(dim=-1) for both in (student, teacher))
    return torch.nn.functional.kl_div(own, other, reduction="sum", log_target=True)


@pytest.mark.parametrize("numbers", [1, 50, 1 << 22])  # a token, four, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient(numbers, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMBERS", numbers)
    student, teacher = logits(0, dtype).requires_grad_(), logits(1, dtype)
    counted = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    found = divergence(student, teacher, counted, 2.0)
    (gradient,) = torch.autograd.grad(0.5 * found, student)
    expected = by_definition(student, teacher, counted, 2.0)
    (wanted,) = torch.autograd.grad(0.5 * expected, student)
    assert (found.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted, **({} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-3}))


def test_a_scaled_loss_in_float16():
    student, counted = logits(0, torch.float16).requires_grad_(), torch.ones(3, 7, dtype=torch.bool)
    teacher = student.detach() + torch.where(torch.arange(11) == 5, 0.01, 0.0).half()  # of which one logit is larger
    scale = 2.0**17  # more than float16 has; a scaler's own is 65,536
    (gradient,) = torch.autograd.grad(divergence(student, teacher, counted, 1.0) * scale / 64, student)
    (wanted,) = torch.autograd.grad(by_definition(student, teacher, counted, 1.0) * scale / 64, student)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, wanted.half(), rtol=2e-3, atol=1e-3)


def test_tokens_that_do_not_count_may_be_anything():
    student, teacher = logits(0, torch.float32), logits(1, torch.float32)
    student[0, 0] = teacher[1, 2] = float("nan")
    counted = torch.ones(3, 7, dtype=torch.bool)
    counted[0, 0] = counted[1, 2] = False
    student.requires_grad_()
    found = divergence(student, teacher, counted, 1.0)
    found.backward()
    torch.testing.assert_close(found.double(), by_definition(student.detach(), teacher, counted, 1.0))
    assert student.grad.isfinite().all()
    assert not student.grad[~counted].any()
