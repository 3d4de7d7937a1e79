"""How one NF4 weight is cut over ranks (`NF4Cut`), and the tensors of one rank's part (`NF4Fields`). See reference.py."""

from __future__ import annotations

import dataclasses

import torch
from bitsandbytes.functional import QuantState

from . import reference

__all__ = ["NF4Cut", "NF4Fields", "number", "shared"]

_BLOCKS = 256  # blocks a group where absmax is not quantised itself


@dataclasses.dataclass(frozen=True)
class NF4Cut:
    """What all ranks know of one weight: the facts of its `QuantState`, and how it is cut."""

    shape: torch.Size  # of the dense weight
    dtype: torch.dtype  # that it dequantises to
    blocksize: int
    blocksize2: int  # 0: absmax is float32
    world: int
    quant_type: str = "nf4"

    @property
    def n_weights(self) -> int:
        return self.shape.numel()

    @property
    def n_bytes(self) -> int:
        return (self.n_weights + 1) // 2

    @property
    def blocks(self) -> int:
        return -(-self.n_weights // self.blocksize)

    @property
    def group_blocks(self) -> int:
        return self.blocksize2 or _BLOCKS

    @property
    def group_weights(self) -> int:
        return self.blocksize * self.group_blocks

    @property
    def group_bytes(self) -> int:
        return self.group_weights // 2

    @property
    def groups(self) -> int:
        return reference.groups(self.n_weights, self.group_weights)

    @property
    def chunk(self) -> int:
        """Groups a rank, padding included."""
        return reference.chunk(self.groups, self.world)

    @property
    def absmax_dtype(self) -> torch.dtype:
        return torch.uint8 if self.blocksize2 else torch.float32

    def real(self, rank: int) -> tuple[int, int]:
        """[start, stop) of the groups of `rank` that are not padding."""
        start = min(rank * self.chunk, self.groups)
        return start, min(start + self.chunk, self.groups)

    @classmethod
    def of(cls, state: QuantState, world: int) -> NF4Cut:
        """Raises ValueError for a state that is not NF4 or of a form that bitsandbytes does not write."""
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type must be 'nf4' to be sharded, got {state.quant_type!r}")
        if state.nested and state.state2.blocksize & (state.state2.blocksize - 1):
            raise ValueError(f"state2.blocksize must be a power of two, got {state.state2.blocksize}")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "the weight is in bitsandbytes' CPU inference layout; shard the model before its first eval"
            )
        blocksize2 = state.state2.blocksize if state.nested else 0
        return cls(torch.Size(state.shape), state.dtype, state.blocksize, blocksize2, world, state.quant_type)


@dataclasses.dataclass
class NF4Fields:
    """One rank's tensors of one weight; what aliases of an `NF4Shard` share."""

    packed: torch.Tensor  # uint8 [chunk * group_bytes]
    absmax: torch.Tensor  # uint8 or float32 [chunk * group_blocks]
    absmax2: torch.Tensor | None  # float32 [chunk]
    offset: torch.Tensor | None  # float32 [], the same on all ranks
    code2: torch.Tensor | None  # float32 [256], shared by all weights
    code: torch.Tensor  # float32 [16], shared by all weights

    def tensors(self) -> list[torch.Tensor]:
        """What this rank alone holds."""
        return [t for t in (self.packed, self.absmax, self.absmax2) if t is not None]

    def map(self, function) -> NF4Fields:
        """The same with `function` of the tensors that this rank alone holds. The others stay where they are: with parameters
        offloaded to the host, copying a number to the card at each gather would wait for the card."""
        packed, absmax = function(self.packed), function(self.absmax)  # in the order of `tensors`
        absmax2 = None if self.absmax2 is None else function(self.absmax2)
        return dataclasses.replace(self, packed=packed, absmax=absmax, absmax2=absmax2)


_shared: dict[tuple, torch.Tensor] = {}


def shared(code: torch.Tensor) -> torch.Tensor:
    """One tensor for all codebooks that are equal bit for bit on a device."""
    key = (code.device, code.dtype, code.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return _shared.setdefault(key, code.detach().clone())


def number(value, device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device=device, dtype=torch.float32).reshape(()).clone()
    return torch.tensor(value, dtype=torch.float32, device=device)
