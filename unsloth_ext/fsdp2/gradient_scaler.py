"""float16's gradient scaler over shards.

A rank sees overflows in its own part of the gradients only. torch's ShardedGradScaler sums `found_inf` over the ranks, and its
sum can be 2 where a fused optimizer skips its step at 1 exactly; Unsloth's FSDP2 found that out (models/fsdp2_native.py in
2026.10.9). Here it is 0 or 1, and a scalar, as the plain scaler's.
"""

from __future__ import annotations

from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

__all__ = ["ShardedScaler"]


class ShardedScaler(ShardedGradScaler):
    """`torch.amp.GradScaler` whose decision to skip a step is that of all ranks."""

    def unscale_(self, optimizer) -> None:
        super().unscale_(optimizer)
        if self.is_enabled():
            found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            for device, value in found.items():
                found[device] = value.clamp(max=1.0).reshape(())
