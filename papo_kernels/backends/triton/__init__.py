"""The Triton backend: the backend protocol (``papo_kernels/reference.py``) for GPU tensors.

Portable: NVIDIA GPUs without the compiled extension, and AMD GPUs; CPU tensors where the process
runs with ``TRITON_INTERPRET=1``. float16, bfloat16 and float32 logits. Calls run on the current
stream of the logits' device, whichever device is current, never synchronise, and allocate only what
they return and, where rows are few, their segments' states. They may be captured in a CUDA graph.
"""

from .fused_loss import policy_loss_fwd, scale_
from .token_stats import token_stats_bwd, token_stats_fwd

__all__ = ["policy_loss_fwd", "scale_", "token_stats_bwd", "token_stats_fwd"]
