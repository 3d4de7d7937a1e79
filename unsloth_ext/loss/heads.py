"""The projection to the vocabulary, whatever it is: a module, or a weight [V, D].

A loss that takes its gradients chunk by chunk calls the head many times. Three things must then happen once, not once a
chunk:

* Gradients. The head is called on detached copies of its trainable tensors (no data is copied), so
  `torch.autograd.grad` inside touches neither their `.grad` nor their hooks. The sum is handed to autograd at the end,
  which runs the hooks of DDP and of the user as it does after any other operation.
* Gathering. A sharded weight (DTensor, FSDP2) is gathered when the head is opened and dropped when it is closed. The
  call goes round FSDP's own hooks, which would gather again each time. Its gradient is averaged over the mesh as FSDP2
  averages, then cut back to this rank's shard.
* Casting. Under autocast a plain linear head is cast once.
"""

from __future__ import annotations

import contextlib
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

_AUTOCAST_ELIGIBLE = (torch.float32, torch.bfloat16, torch.float16)


class Head:
    """A head as the loss sees it. `trainable`: its tensors that want a gradient, in a fixed order."""

    def __init__(self, head: nn.Module | torch.Tensor):
        if isinstance(head, nn.Embedding):
            raise TypeError("head is an nn.Embedding: pass its weight, head=embedding.weight")
        if isinstance(head, torch.Tensor):
            if head.dim() != 2 or not head.is_floating_point():
                shape, dtype = list(head.shape), head.dtype
                raise ValueError(
                    f"head as a tensor must be a floating-point weight [vocabulary, hidden], got {shape} of {dtype}"
                )
            self.module, self.tensors = None, {"weight": head}
        elif isinstance(head, nn.Module):
            self.module, self.tensors = head, dict(head.named_parameters())
        else:
            raise TypeError(f"head must be a module or a weight tensor [vocabulary, hidden], got {type(head).__name__}")
        self.plain = self.module is None or type(self.module) is nn.Linear
        self.trainable = [tensor for tensor in self.tensors.values() if tensor.requires_grad]
        self.sharded = any(is_dtensor(tensor) for tensor in self.tensors.values())

    def vocabulary(self) -> int | None:
        """V, where it can be told without calling the head."""
        if self.module is None:
            return self.tensors["weight"].shape[0]
        size = getattr(self.module, "out_features", None)
        if size is None:
            sizes = [module.out_features for module in self.module.modules() if hasattr(module, "out_features")]
            size = sizes[0] if sizes else None
        return size

    @contextlib.contextmanager
    def opened(self, dtype: torch.dtype, differentiate: bool):
        """(call, leaves): call(x [n, D]) -> logits [n, V]; leaves stand for `trainable`, in its order. dtype: that of x."""
        swapped, leaves = {}, []
        for name, tensor in self.tensors.items():
            trained = differentiate and tensor.requires_grad
            local = self._prepared(tensor, dtype)
            if trained:
                local = local.detach().requires_grad_()
                leaves.append(local)
            if local is not tensor:
                swapped[name] = local
        try:
            yield self._caller(swapped), leaves
        finally:  # whoever still holds `call` (a traceback does) must not keep a gathered weight alive
            swapped.clear()

    def traced(self, dtype: torch.dtype):
        """`opened` for a compiler: plain differentiable operations, with gradients that are summed in fp32."""
        swapped = {}
        for name, tensor in self.tensors.items():
            local = tensor
            if is_dtensor(tensor):
                partial = sys.modules["torch.distributed.tensor"].Partial("avg")
                local = tensor.to(self._dtype(tensor, dtype)).full_tensor(
                    grad_placements=[partial] * tensor.device_mesh.ndim
                )
            elif tensor.requires_grad and tensor.dtype in (torch.float16, torch.bfloat16):
                swapped[name] = (local.float(), local.dtype)
                continue
            if local is not tensor:
                swapped[name] = (local, local.dtype)
        names, values = list(swapped), [value for value, _ in swapped.values()]

        def call(x, values):
            now = {name: value.to(swapped[name][1]) for name, value in zip(names, values, strict=True)}
            return self._caller(now)(x)

        return call, values

    def gradient(self, tensor: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The summed gradient of one trainable tensor, as autograd wants it: its dtype, and its shard of the average."""
        if is_dtensor(tensor):
            from torch.distributed.tensor import DTensor, Partial

            mesh = tensor.device_mesh
            grad = grad.div_(mesh.size())  # then a sum: not every backend can average
            grad = DTensor.from_local(grad, mesh, [Partial()] * mesh.ndim, run_check=False)
            grad = grad.redistribute(mesh, tensor.placements)
        return grad.to(tensor.dtype)

    def _prepared(self, tensor, dtype):
        if is_dtensor(tensor):
            with torch.no_grad():
                return tensor.detach().to(self._dtype(tensor, dtype)).full_tensor()
        autocast = autocast_dtype(tensor.device.type)
        if self.plain and autocast is not None and tensor.dtype in _AUTOCAST_ELIGIBLE:
            return tensor.detach().to(autocast)
        return tensor

    def _dtype(self, tensor, dtype):
        """What a sharded tensor is gathered in: as its mixed-precision policy says, or a plain head as its input."""
        policy = getattr(getattr(_fsdp_state(self.module), "_mp_policy", None), "param_dtype", None)
        if policy is not None:
            return policy
        return (autocast_dtype(tensor.device.type) or dtype) if self.plain else tensor.dtype

    def _caller(self, swapped):
        if self.module is None:
            return lambda x: F.linear(x, swapped.get("weight", self.tensors["weight"]))
        if not swapped:
            return self.module
        if _fsdp_state(self.module) is None:
            return lambda x: functional_call(self.module, swapped, (x,))
        inner = {f"module.{name}": tensor for name, tensor in swapped.items()}
        return lambda x: functional_call(_WithoutHooks(self.module), inner, (x,))


class _WithoutHooks(nn.Module):
    """Calls a module's forward but not its hooks, which belong to FSDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.forward(x)


def is_dtensor(tensor) -> bool:
    # A DTensor exists only where its module has been imported: no import for everybody else.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _fsdp_state(module):
    read = getattr(module, "_get_fsdp_state", None)
    return None if read is None else read()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast that is on for this kind of device, or None."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
