"""float16's gradient scaler over shards.

A rank sees overflows in its own part of the gradients only. torch's ShardedGradScaler sums `found_inf` over the ranks, and its
sum can be 2 where a fused optimizer skips its step at 1 exactly; Unsloth's FSDP2 found that out (models/fsdp2_native.py in
2026.10.9). Here it is 0 or 1, and a scalar, as the plain scaler's.

It looks for gradients at the optimizer's parameters, where `on_local_shards` puts them only for a step: it asks for them here.
"""

from __future__ import annotations

from torch.amp.grad_scaler import OptState
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

__all__ = ["ShardedScaler"]


class ShardedScaler(ShardedGradScaler):
    """`torch.amp.GradScaler` whose decision to skip a step is that of all ranks."""

    def step(self, optimizer, *args, **kwargs):
        _hand_over(optimizer)
        if self.is_enabled() and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            self.unscale_(optimizer)  # the plain scaler leaves it to a fused optimizer, and each rank to itself
        return super().step(optimizer, *args, **kwargs)

    def unscale_(self, optimizer) -> None:
        _hand_over(optimizer)
        super().unscale_(optimizer)
        if self.is_enabled():
            found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            for device, value in found.items():
                found[device] = value.clamp(max=1.0).reshape(())

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        # A rank that owns no part of what is trained answers too: the others wait for it.
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16) or {found_inf.device: found_inf}


def _hand_over(optimizer) -> None:
    if (hand_over := getattr(optimizer, "_unsloth_ext_hand_over", None)) is not None:
        hand_over()
