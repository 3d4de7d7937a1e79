"""One cuBLAS workspace at a time.

torch keeps a workspace for each thread that multiplies matrices (each cuBLAS handle and stream): 32 MiB on Hopper, 8 elsewhere. A training
step has two such threads, the one that calls the forward and autograd's, and never both at once. So the forward's workspace is let go
when the model's forward ends, and the backward's when the next forward begins: each comes back with the first product that needs one,
out of what torch's allocator has, on the stream that its last product ran on. A rank holds 32 MiB less, at its peak too.

Backwards in the caller's thread (`torch.autograd.set_multithreading_enabled(False)`) would save as much and cost as little (8B, two H200), but
a loop of the user's own would have to ask for them.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["one_workspace"]


def one_workspace(model: nn.Module) -> None:
    """Install the two hooks. In forwards without a gradient, of which generation makes one a token, nothing is let go."""
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        model.register_forward_pre_hook(_let_go)
        model.register_forward_hook(_let_go)


@torch.compiler.disable
def _let_go(*_) -> None:
    # A CUDA graph under capture has taken its address.
    if torch.is_grad_enabled() and not torch.cuda.is_current_stream_capturing():
        torch._C._cuda_clearCublasWorkspaces()
