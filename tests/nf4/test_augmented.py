"""Weights one under the other and beside other matrices: the numbers of dequantize, where they belong."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_states import Spec, as_list, bits, expected, specs

from unsloth_ext.nf4 import dequantization
from unsloth_ext.nf4.augmented import nf4_augmented, nf4_stacked
from unsloth_ext.nf4.quant_state import DTYPES


@settings(max_examples=25)
@given(
    st.integers(1, 300).flatmap(lambda k: st.lists(specs(columns=k, magnitude="usual"), min_size=1, max_size=4)),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(DTYPES),
)
def test_stacked(made, ranks, dtype):
    columns, weights = made[0].columns, [spec.make() for spec in made]
    extra = [torch.randn(rank, columns) for rank in ranks]
    found = nf4_stacked(weights, extra, dtype)
    wanted = torch.cat([*(expected(*weight, dtype) for weight in weights), *(e.to(dtype) for e in extra)])
    assert found.dtype == dtype and torch.equal(bits(found), bits(wanted))


@settings(max_examples=25)
@given(specs(magnitude="usual"), st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), st.sampled_from(DTYPES))
def test_augmented(spec, left, right, dtype):
    packed, state = spec.make()
    left, right = (None if n is None else torch.randn(spec.rows, n, dtype=torch.float64) for n in (left, right))
    found = nf4_augmented(packed, state, left, right, dtype)
    sides = [None if side is None else side.to(dtype) for side in (left, right)]
    wanted = torch.cat([one for one in (sides[0], expected(packed, state, dtype), sides[1]) if one is not None], 1)
    assert found.dtype == dtype and found.is_contiguous() and torch.equal(bits(found), bits(wanted))


def test_the_states_dtype_and_old_states():
    packed, state = Spec(rows=4, columns=128, dtype=torch.float16).make()
    old = as_list(state)
    old[4][0] = float(old[4][0])  # some have a number for the offset
    assert torch.equal(nf4_stacked([(packed, old)]), expected(packed, state))
    assert torch.equal(nf4_augmented(packed, old), expected(packed, state))


@pytest.mark.parametrize("nested", [True, False])
def test_operators(nested):
    (packed, state), (other, second) = (
        Spec(rows=rows, columns=128, nested=nested).make() for rows in (5, 8)
    )  # fmt: skip
    states = [state, second]
    inner = [s.state2 for s in states]
    lists = [[i and i.code for i in inner], [i and i.absmax for i in inner], [s.offset for s in states]]
    sizes = [[64, 64], [256, 256] if nested else [0, 0]]
    extra = torch.randn(3, 128)
    torch.library.opcheck(
        torch.ops.unsloth_ext.nf4_stacked.default,
        ([packed, other], [s.absmax for s in states], *lists, *sizes, [5, 8], 128, torch.bfloat16, [extra]),
    )
    fields = (packed, state.absmax, *(one[0] for one in lists), *(one[0] for one in sizes))
    torch.library.opcheck(
        torch.ops.unsloth_ext.nf4_augmented.default, (*fields, [5, 128], torch.bfloat16, torch.randn(5, 3), None)
    )


def test_what_does_not_fit():
    packed, state = Spec(rows=4, columns=64).make()
    other = Spec(rows=4, columns=128).make()
    with pytest.raises(ValueError, match=r"weights must be matrices of equal K, got shapes \[\(4, 64\), \(4, 128\)\]"):
        nf4_stacked([(packed, state), other])
    with pytest.raises(ValueError, match="weights must hold at least one"):
        nf4_stacked([])
    with pytest.raises(ValueError, match=r"extra_rows must be matrices with 64 columns, got shape \(3, 65\)"):
        nf4_stacked([(packed, state)], [torch.zeros(3, 65)])
    with pytest.raises(ValueError, match=r"left must be a matrix with 4 rows, got shape \(5, 8\)"):
        nf4_augmented(packed, state, torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"right must be a matrix with 4 rows, got shape \(4,\)"):
        nf4_augmented(packed, state, None, torch.zeros(4))
    with pytest.raises(ValueError, match="packed must hold 128 bytes"):
        nf4_augmented(packed[:-1], state)
    state.shape = torch.Size([256])
    with pytest.raises(ValueError, match=r"quant_state must describe a matrix, got shape \(256,\)"):
        nf4_augmented(packed, state)


# The machine code, for cards that are not here


def compiled(capability, dtype, units, *, nested=True, blocksize=64, row=512, gap=2, ahead=0):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from unsloth_ext.nf4.augmented_kernel import pitched_kernel

    names, warps = pitched_kernel.arg_names, 4
    types = ["*u8", "*u8" if nested else "*fp32", *["*fp32"] * 4, f"*{dtype}", "i64"]
    values = (blocksize.bit_length() - 1, 8, nested, units, 32 * warps, capability >= 90, ahead, "", row, gap)
    signature = dict(zip(names, types + ["constexpr"] * len(values), strict=True))
    constants = {(len(types) + i,): value for i, value in enumerate(values)}
    options = {"num_warps": warps, "enable_fp_fusion": False} | ({"launch_pdl": True} if capability >= 90 else {})
    kernel = triton.compile(
        ASTSource(pitched_kernel, signature, constants, {}),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return kernel, re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)


@pytest.mark.parametrize(
    ("capability", "dtype", "options"),
    [
        (80, "bf16", {}),
        (90, "bf16", {"ahead": 512}),
        (90, "fp16", {"row": 1792, "gap": 3}),
        (90, "bf16", {"nested": False, "blocksize": 128, "row": 72}),
        (100, "bf16", {"blocksize": 4096}),
    ],
)
def test_machine_code(capability, dtype, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, instructions = compiled(capability, dtype, 2, **options)
    stores = [name for name in instructions if name.startswith("STG")]
    assert len(stores) == 2 and all(".128" in name for name in stores), stores
    assert kernel.metadata.shared == 0
    assert not any(name.startswith(("BAR", "LDS", "STS", "LDL", "STL", "FFMA")) for name in instructions)


# On a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stacked_on_a_card(dtype):
    weights = [Spec(rows=n, columns=4096, dtype=dtype, seed=n).make("cuda") for n in (4096, 1024, 1024)]
    extra = [torch.randn(16, 4096, device="cuda") for _ in range(3)]
    wanted = torch.cat([*(dequantization.dequantize(*weight) for weight in weights), *(e.to(dtype) for e in extra)])
    for _ in range(2):
        assert torch.equal(bits(nf4_stacked(weights, extra)), bits(wanted))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns", "left", "right"),
    [(14336, 4096, 16, None), (14336, 4096, None, 16), (96, 64, 8, 8), (97, 320, 24, 8), (512, 2048, 3, None)],
)
def test_augmented_on_a_card(rows, columns, left, right):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for nested in (True, False):
            packed, state = Spec(rows=rows, columns=columns, dtype=dtype, nested=nested, seed=rows).make("cuda")
            sides = [None if n is None else torch.randn(rows, n, device="cuda") for n in (left, right)]
            dense = dequantization.dequantize(packed, state)
            parts = [sides[0], dense, sides[1]]
            wanted = torch.cat([part.to(dtype) for part in parts if part is not None], 1)
            for _ in range(2):
                assert torch.equal(bits(nf4_augmented(packed, state, *sides)), bits(wanted))


@pytest.mark.gpu
def test_the_kernel_is_used():
    from unsloth_ext.nf4 import augmented, launch

    if launch.capability(0) < (8, 0):
        pytest.skip("the kernel needs sm_80")
    packed, state = Spec(rows=64, columns=1024, seed=5).make("cuda")
    nf4_augmented(packed, state, torch.zeros(64, 8, device="cuda"))
    found = [go for (variant, columns, pitch), go in augmented._pitched.items() if (columns, pitch) == (1024, 1032)]
    assert found and all(found)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False])
def test_in_a_graph(first):
    """Captured before anything was compiled (bitsandbytes and a copy then) and after."""
    rows = 72 if first else 80  # another K is another kernel
    columns = 64 * rows
    weights = [Spec(rows=rows, columns=columns, seed=s).make("cuda") for s in (1, 2)]
    left = torch.randn(rows, 8, device="cuda", dtype=torch.bfloat16)

    def both():
        return nf4_stacked(weights, [left.t()[:, :1].expand(8, columns)]), nf4_augmented(*weights[0], left)

    dense = [dequantization.dequantize(*weight) for weight in weights]
    if not first:
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stacked, augmented = both()
    left.copy_(torch.randn_like(left))
    graph.replay()
    assert torch.equal(bits(stacked), bits(torch.cat([*dense, left.t()[:, :1].expand(8, columns)])))
    assert torch.equal(bits(augmented), bits(torch.cat([left, dense[0]], 1)))
