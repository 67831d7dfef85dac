"""
The divergence of a model's logits from another's, a few tokens at a time. All of them in float32, once for each step
from logits to loss, would take several times as much memory as most small models.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


CHUNK_NUMBERS = 1 << 22  # logits that are taken together


def divergence(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """
    The sum over tokens of KL(teacher || student), in float32 (arXiv 1503.02531, section 2, but for a constant).

    Args:
        student: logits (B, T, V); the gradient is theirs alone.
        teacher: logits of the same shape.
        counted: (B, T), bool; which tokens.
        temperature: both logits are divided by it.
    """
    return _Divergence.apply(student, teacher, counted, temperature)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
        size = max(CHUNK_NUMBERS // student.shape[-1], 1)
        # float16 would round small gradients to zero before a loss that is scaled against that multiplies them
        ctx.dtype, kept_dtype = student.dtype, torch.float32 if student.dtype == torch.float16 else student.dtype
        total = torch.zeros((), device=student.device)
        grads = []
        rows = (tensor.flatten(0, -2).split(size) for tensor in (student, teacher, counted[..., None]))
        for own, other, kept in zip(*rows, strict=True):
            own, other = (
                (logits.to(student.device).float() / temperature).log_softmax(dim=-1) for logits in (own, other)
            )
            share = other.exp()
            by_token = ((other - own) * share).sum(dim=-1, keepdim=True)
            total = total + by_token.masked_fill(~kept, 0).sum()
            if ctx.needs_input_grad[0]:
                grads.append(((own.exp() - share) / temperature).masked_fill(~kept, 0).to(kept_dtype))
        if grads:
            ctx.save_for_backward(torch.cat(grads).view(student.shape))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor):
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(ctx.dtype), None, None, None
