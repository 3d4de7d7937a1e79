"""The matmul kernels without a card: `many_rows_kernel`'s plain decode in Triton's interpreter, and what the compiler makes of both.

Inline PTX cannot be interpreted, so `few_rows_kernel` and the PTX decodes only run in test_matmul_gpu.py; here their machine code
is read.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

INTERPRETED = """
import json, torch
from unsloth_ext.nf4.matmul_kernel import many_rows_kernel, sum_kernel
from unsloth_ext.nf4.quant_state import BLOCKSIZES
from unsloth_ext.nf4.reference import CODE, dequantize, scales

seed = int(__import__("os").environ["UNSLOTH_EXT_TEST_SEED"])
random = torch.Generator().manual_seed(seed)
def draw(*options):
    return options[int(torch.randint(0, len(options), (), generator=random))]

wrong, cases = [], 0
for dtype in (torch.float16, torch.bfloat16):
    for blocksize in BLOCKSIZES:
        for _ in range(2):
            m, n, wide = draw(1, 5, 17, 33), draw(7, 31, 32, 50), draw(64, 128)
            k, blocksize2 = wide * draw(1, 2, 3), draw(64, 256)
            nested, split, bias = draw(False, True), draw(1, 2), draw(False, True)
            blocks = -(-n * k // blocksize)
            packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=random)
            code2, offset = torch.randn(256, generator=random), torch.randn(1, generator=random)
            absmax2 = torch.rand(-(-blocks // blocksize2), generator=random)
            absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=random)
            flat = code2[absmax.long()]
            x, b = torch.randn(m, k, generator=random).to(dtype), torch.randn(n, generator=random).to(dtype)
            out = torch.full((m, n), float("nan"), dtype=dtype)
            target = out if split == 1 else torch.full((split, m, n), float("nan"))
            many_rows_kernel[(-(-m // 16), -(-n // 32), split)](
                x, packed.view(torch.int32), absmax if nested else flat, code2, absmax2, offset, packed, torch.tensor(CODE), b,
                target, m, n, K=k, BLOCK_SHIFT=blocksize.bit_length() - 1, BLOCK2_SHIFT=blocksize2.bit_length() - 1,
                NESTED=nested, BIAS=bias and split == 1, INVERSE=1.0, BLOCK_N=32, BLOCK_M=16, BLOCK_K=wide, SPLIT=split,
                SCALE_SUMS=False, THREADS=128, STAGES=1, OVERLAP=False, PTX=False,
            )
            if split > 1:
                sum_kernel[(-(-m * n // 128),)](target, b, out, m * n, n, SPLIT=split, BIAS=bias, BLOCK=128, OVERLAP=False)
            scale = scales(absmax, code2, absmax2, offset, blocksize2) if nested else flat
            weight = dequantize(packed, scale, blocksize, (n, k), dtype).double()
            expected = x.double() @ weight.t() + (b.double() if bias else 0)
            error = ((out.double() - expected).norm() / expected.norm()).item()
            cases += 1
            # The interpreter cuts the low half off where it converts to bfloat16, in the weight as in the result: each time by up
            # to 2**-7 of a number, which weighs more where few sums are compared and their terms cancel.
            if not error < (3 * 2**-7 if dtype == torch.bfloat16 else 1e-3):
                wrong.append(str((seed, dtype, m, n, k, blocksize, nested, split, bias, error)))
print(json.dumps([cases, wrong]))
"""


def test_many_rows_in_the_interpreter(python):
    done = python(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    cases, wrong = json.loads(done.stdout.splitlines()[-1])
    assert cases == 32 and wrong == []


def machine_code(kernel, types, constants, warps, aligned=(), registers=None):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    values = {(len(types) + i,): value for i, value in enumerate(constants)}
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "launch_pdl": True, "enable_fp_fusion": True, "maxnreg": registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)


def types_of(dtype, nested, packed):
    return [f"*{dtype}", packed, "*u8" if nested else "*fp32", *["*fp32"] * 3, "*i32"]


@pytest.mark.parametrize("groups, wide", [(1, True), (1, False), (2, False)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_machine_code_of_few_rows(dtype, groups, wide, tmp_path, monkeypatch):
    from unsloth_ext.nf4.matmul_kernel import few_rows_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = [*types_of(dtype, True, "*u8"), f"*{dtype}", f"*{dtype}", "i32", "i32"]
    constants = (4096, 6, 8, True, False, 0.7, groups, wide, 4, True, True)
    names = machine_code(few_rows_kernel, types, constants, 4, registers=128)
    spilled = sum(name.startswith(("LDL", "STL")) for name in names)
    assert spilled <= (0 if wide else 24), spilled
    assert sum(name.startswith("HMMA") for name in names) == 16 * groups  # a step of 4096 weights
    # The packed bytes: 64 a lane before the loop, and 64 in each step for the next.
    loads = [name for name in names if name.startswith("LDG") and ".NA." in name]
    assert len(loads) == 2 * (4 if wide else 8) and all((".128" if wide else ".64") in name for name in loads)
    # Two integer operations and one load from shared memory for each of 64 bytes, and not much beside them.
    assert 64 <= sum(name.startswith("LDS") for name in names) < 64 + 40 * groups


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("scale_sums", [False, True])
def test_machine_code_of_many_rows(dtype, scale_sums, tmp_path, monkeypatch):
    from unsloth_ext.nf4.matmul_kernel import many_rows_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = [*types_of(dtype, True, "*i32"), "*fp32", f"*{dtype}", f"*{dtype}", "i32", "i32"]
    constants = (4096, 6, 8, True, False, 0.7, 128, 64, 64, 1, scale_sums, 256, 3, True, True)
    names = machine_code(many_rows_kernel, types, constants, 8, aligned=(0, 1, 9))
    assert any(name.startswith("HGMMA") for name in names)
    assert not any(name.startswith(("LDL", "STL")) for name in names)
