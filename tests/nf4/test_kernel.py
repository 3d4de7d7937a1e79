"""The kernel without a card: its plain path in Triton's interpreter, and what the compiler makes of its wide path.

Inline PTX cannot be interpreted, so the arithmetic of the wide path is only run in test_gpu.py; here its machine code is read.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

INTERPRETED = """
import json, torch
from unsloth_ext.nf4.kernel import dequantize_kernel
from unsloth_ext.nf4.quant_state import BLOCKSIZES
from unsloth_ext.nf4.reference import CODE, dequantize, scales

random = torch.Generator().manual_seed(3407)
def draw(*options):
    return options[int(torch.randint(0, len(options), (), generator=random))]

wrong, cases = [], 0
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for _ in range(40):
        n, blocksize, blocksize2 = int(torch.randint(1, 1500, (), generator=random)), draw(*BLOCKSIZES), draw(64, 256)
        nested, factor = draw(False, True), draw(1.0, 1e-38, 1e38)
        blocks = -(-n // blocksize)
        packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=random)
        code2 = torch.randn(256, generator=random) * factor
        code2[:3] = torch.tensor([float("inf"), float("nan"), -0.0])
        absmax2 = torch.rand(-(-blocks // blocksize2), generator=random)
        offset = torch.randn(1, generator=random) * factor
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=random)
        flat = code2[absmax.long()]
        def run(out):
            dequantize_kernel[(-(-n // 64),)](
                packed, absmax if nested else flat, code2, absmax2, offset, torch.tensor(CODE), out, n,
                BLOCK_SHIFT=blocksize.bit_length() - 1, BLOCK2_SHIFT=blocksize2.bit_length() - 1, NESTED=nested, WIDE=False,
                REST=False, UNITS=64, THREADS=128, PTX=False, BEFORE_SM80=False, OVERLAP=False, AHEAD=0, ROOM="",
            )
            return out
        out = run(torch.full((n,), 7.0, dtype=dtype))
        scale = scales(absmax, code2, absmax2, offset, blocksize2) if nested else flat
        if dtype == torch.bfloat16:
            # The interpreter's own conversion to bf16 cuts the low half off. So: the fp32 result is exact (checked by the third
            # dtype too), and the bf16 result is its upper half.
            whole = run(torch.full((n,), 7.0))
            expected = (whole.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
            exact = dequantize(packed, scale, blocksize, (n,), torch.float32)
            same = torch.equal(whole.nan_to_num(0.5), exact.nan_to_num(0.5))
        else:
            expected, same = dequantize(packed, scale, blocksize, (n,), dtype), True
        nan = out.isnan()
        cases += 1
        if not (same and torch.equal(nan, expected.isnan()) and torch.equal(out[~nan], expected[~nan])):
            wrong.append(str((dtype, n, blocksize, nested, factor)))
print(json.dumps([cases, wrong]))
"""


def test_the_plain_path_in_the_interpreter(python):
    done = python(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    cases, wrong = json.loads(done.stdout.splitlines()[-1])
    assert cases == 120 and wrong == []


def compiled(
    capability, dtype, units, *, nested=True, blocksize=64, rest=False, overlap=False, warps=4, ahead=0, aside=0
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from unsloth_ext.nf4.kernel import dequantize_kernel, room

    names = dequantize_kernel.arg_names
    types = ["*u8", "*u8" if nested else "*fp32", *["*fp32"] * 4, f"*{dtype}", "i64"]
    values = (blocksize.bit_length() - 1, 8, nested, True, rest, units, 32 * warps, True, capability < 80, overlap)
    values += (ahead, room(aside))
    signature = dict(zip(names, types + ["constexpr"] * len(values), strict=True))
    constants = {(len(types) + i,): value for i, value in enumerate(values)}
    options = {"num_warps": warps, "enable_fp_fusion": False} | ({"launch_pdl": True} if overlap else {})
    kernel = triton.compile(
        ASTSource(dequantize_kernel, signature, constants, {}),
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
    "capability", [75, 80, *(pytest.param(c, marks=pytest.mark.extended) for c in (86, 89)), 90, 100]
)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_machine_code(capability, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for units in (1, 4):
        kernel, instructions = compiled(capability, dtype, units, overlap=capability >= 90)
        stores = [name for name in instructions if name.startswith("STG")]
        assert kernel.metadata.shared == 0 and not any(
            name.startswith(("BAR", "LDS", "STS", "LDL", "STL")) for name in instructions
        )
        assert len(stores) == units and all(".128" in name for name in stores), stores
        # Every load is issued before the first lookup: more than one word a lane is of no use otherwise.
        first_lookup = next(i for i, name in enumerate(instructions) if name.startswith("SHFL"))
        assert not any(name.startswith("LDG") for name in instructions[first_lookup:])
        # No product is contracted into a sum.
        assert not any(name.startswith("FFMA") for name in instructions)


@pytest.mark.parametrize(
    "options", [{"blocksize": 32}, {"blocksize": 4096}, {"nested": False}, {"units": 8}, {"warps": 8}]
)
def test_machine_code_of_other_states(options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    units = options.pop("units", 4)
    kernel, instructions = compiled(90, "bf16", units, overlap=True, **options)
    assert kernel.metadata.shared == 0
    assert sum(name.startswith("STG") and ".128" in name for name in instructions) == units


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_machine_code_of_prefetches(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, instructions = compiled(90, dtype, 4, overlap=True, ahead=2048, aside=28000)
    assert sum(name.startswith("UBLKPF") for name in instructions) == 2  # the packed bytes and their scales
    assert sum(name.startswith("STG") for name in instructions) == 4
    assert not any(name.startswith("BAR") for name in instructions)
    # Shared memory is set aside in front of Triton's, which is not there: nothing can overlap.
    assert kernel.metadata.shared == 0 and "nf4_room[28000]" in kernel.asm["ptx"]
