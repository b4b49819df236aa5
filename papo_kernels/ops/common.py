"""What the operations share: their backend, the layout of rows, and what backward refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.backends import Backend, choose
from papo_kernels.dispatch import is_plain, kernel_or_operation


def backend_for(requested: str, logits: Tensor) -> Backend:
    return choose(requested or None, logits.device, logits.dtype)


def as_rows(logits: Tensor) -> Tensor:
    """`logits` as `[N, V]` with unit column stride, a view where the layout allows."""
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "papo_kernels: the backward pass is not differentiable; "
            "call backward() or autograd.grad() without create_graph=True"
        )


# ---- scale_ -------------------------------------------------------------------------------------


@custom_op(
    "papo::scale_",
    mutates_args=("dlogits",),
    schema="(Tensor(a!) dlogits, Tensor factor, str backend) -> ()",
)
def scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`dlogits [N, V] *= factor` (0-dim); free where the factor is 1."""
    _scale(dlogits, factor, backend)


@scale_.register_fake
def _(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    return None


def _scale(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    backend_for(backend, dlogits).scale_(dlogits, factor)


def run_scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`scale_`, by the shortest way."""
    kernel_or_operation((dlogits, factor), _scale, scale_)(dlogits, factor, backend)


def scaled(grads: Sequence[Tensor | None], factor: Tensor, backend: str) -> list[Tensor | None]:
    """Gradients formed in the forward pass times the upstream scalar, in place if this is their
    last use. A graph that is kept may come back for them, and a traced one must not write to what
    its forward part returns."""
    results: list[Tensor | None] = []
    for grad in grads:
        if grad is not None:
            last = is_plain(grad) and not torch._C._autograd._get_current_graph_task_keep_graph()
            # A tensor of its own lets the leaf take the memory over instead of copying it.
            grad = grad.detach() if last else grad.clone()
            rows = grad[None] if grad.dim() == 1 else grad.flatten(0, -2)
            run_scale_(rows, factor, backend)
        results.append(grad)
    return results
