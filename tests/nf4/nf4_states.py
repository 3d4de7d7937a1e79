"""Random NF4 weights in every form that bitsandbytes knows, for the tests of the nf4 room."""

from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState
from hypothesis import strategies as st

from unsloth_ext.nf4.quant_state import BLOCKSIZES, DTYPES
from unsloth_ext.nf4.reference import CODE, dequantize, scales


@dataclass(frozen=True)
class Spec:
    """What to make. `make` gives (packed, quant_state)."""

    rows: int = 8
    columns: int = 96
    dtype: torch.dtype = torch.bfloat16
    blocksize: int = 64
    blocksize2: int = 256
    nested: bool = True
    magnitude: str = "usual"  # or "tiny", "huge", "special"
    storage: torch.dtype = torch.uint8
    shift: int = 0  # bytes by which the packed data are off a 16-byte boundary
    seed: int = 0

    def make(self, device="cpu"):
        random = torch.Generator().manual_seed(self.seed)
        n = self.rows * self.columns
        blocks = -(-n // self.blocksize)
        packed = torch.randint(0, 256, ((n + 1) // 2 + self.shift,), dtype=torch.uint8, generator=random).to(device)
        packed = packed[self.shift :].unsqueeze(1)
        if self.storage != torch.uint8 and packed.numel() % self.storage.itemsize == 0 and self.shift == 0:
            packed = packed.reshape(-1).view(self.storage).unsqueeze(1)
        code2 = torch.randn(256, generator=random) * self._factor()
        absmax2 = torch.rand(-(-blocks // self.blocksize2), generator=random) + 0.1
        offset = torch.randn((), generator=random) * self._factor()
        if self.magnitude == "special":
            code2[::16], code2[1::16], code2[2::16], code2[3::16] = float("inf"), float("-inf"), float("nan"), -0.0
            code2[4::16], offset = 1e-39, offset * 0
        flat = code2[torch.randint(0, 256, (blocks,), generator=random)]
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=random)
        inner = QuantState(
            absmax=absmax2.to(device), code=code2.to(device), blocksize=self.blocksize2, dtype=torch.float32
        )
        state = QuantState(
            absmax=(absmax if self.nested else flat).to(device),
            shape=torch.Size([self.rows, self.columns]),
            code=torch.tensor(CODE, device=device),
            blocksize=self.blocksize,
            quant_type="nf4",
            dtype=self.dtype,
            offset=offset.to(device) if self.nested else None,
            state2=inner if self.nested else None,
        )
        return packed, state

    def _factor(self):
        return {"usual": 0.05, "tiny": 1e-38, "huge": 1e38, "special": 1.0}[self.magnitude]


def specs(**fixed):
    """A hypothesis strategy for Spec; keywords fix or replace fields."""
    fields = {
        "rows": st.integers(1, 40),
        "columns": st.integers(1, 300),
        "dtype": st.sampled_from(DTYPES),
        "blocksize": st.sampled_from(BLOCKSIZES),
        "blocksize2": st.sampled_from([64, 256]),
        "nested": st.booleans(),
        "magnitude": st.sampled_from(["usual", "tiny", "huge", "special"]),
        "storage": st.sampled_from([torch.uint8, *DTYPES]),
        "shift": st.sampled_from([0, 0, 0, 1, 2, 4]),
        "seed": st.integers(0, 2**32 - 1),
    }
    given = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    return st.builds(Spec, **(fields | given))


def expected(packed, state, dtype=None):
    """By the reference."""
    if state.nested:
        factor = scales(state.absmax, state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    else:
        factor = state.absmax
    raw = packed.reshape(-1).view(torch.uint8)
    return dequantize(raw, factor, state.blocksize, state.shape, dtype or state.dtype)


def as_list(state):
    """The form that bitsandbytes used before QuantState."""
    inner = state.state2
    nested = (
        [state.offset, [inner.absmax, inner.code, inner.blocksize, False, inner.dtype, None, None]] if inner else None
    )
    return [state.absmax, state.shape, state.dtype, state.blocksize, nested, "nf4", state.code]


def bits(tensor):
    """The tensor as integers, so that NaNs and signs of zero compare too."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
