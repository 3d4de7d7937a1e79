"""The NF4 dequantization kernel: 16-byte stores, no shared memory and no barrier, every load issued
before the first code is looked up, and on a GPU every bit equal to bitsandbytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")  # the kernels import, though nothing runs them

import unsloth  # noqa: F401, E402 (before transformers)
import triton  # noqa: E402
from unsloth.kernels import utils  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA card")


def find_kernel():
    for module in list(sys.modules.values()):
        kernel = getattr(module, "__dict__", {}).get("dequantize_kernel")
        if "BLOCK_SHIFT" in getattr(kernel, "arg_names", ()):
            return kernel
    pytest.fail("fast_dequantize has no kernel with a wide path")


def machine_code(capability, dtype, units, folder):
    """(compiled kernel, SASS instruction names) for a card that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = find_kernel()
    types = ["*u8", "*u8", "*fp32", "*fp32", "*fp32", "*fp32", f"*{dtype}", "i64"]
    values = dict(
        BLOCK_SHIFT = 6,
        BLOCK2_SHIFT = 8,
        NESTED = True,
        WIDE = True,
        REST = False,
        UNITS = units,
        THREADS = 128,
        PTX = True,
        BEFORE_SM80 = capability < 80,
        OVERLAP = False,
        AHEAD = 0,
        ROOM = "",
    )
    names = kernel.arg_names
    signature = {**dict(zip(names, types)), **{name: "constexpr" for name in values}}
    constants = {(names.index(name),): value for name, value in values.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {}),
        target = GPUTarget("cuda", capability, 32),
        options = {"num_warps": 4, "enable_fp_fusion": False},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not nvdisasm.is_file():
        pytest.skip("this Triton has no nvdisasm")
    sass = subprocess.run([nvdisasm, "-c", cubin], capture_output = True, text = True).stdout
    return compiled, re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("units", [1, 4])
def test_machine_code(capability, dtype, units, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled, names = machine_code(capability, dtype, units, tmp_path)
    assert compiled.metadata.shared == 0
    assert not [name for name in names if name.startswith(("BAR", "LDS", "STS", "LDL", "STL"))]
    stores = [name for name in names if name.startswith("STG")]
    assert len(stores) == units and all(".128" in name for name in stores)
    first_lookup = next(i for i, name in enumerate(names) if name.startswith("SHFL"))
    assert not [name for name in names[first_lookup:] if name.startswith("LDG")]
    assert not [name for name in names if name.startswith("FFMA")]  # the scale is rounded twice


def test_what_is_not_nf4_is_left_alone():
    W = torch.ones(2, 2)
    assert utils.fast_dequantize(W, None) is W


def quantized(
    rows,
    columns,
    dtype,
    blocksize = 64,
    nested = True,
):
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(3407)
    W = torch.randn(rows, columns, dtype = dtype, device = "cuda")
    return quantize_4bit(W, blocksize = blocksize, compress_statistics = nested, quant_type = "nf4")


def bits(X):
    return X.contiguous().view(torch.int32 if X.element_size() == 4 else torch.int16)


def assert_bit_exact(X, W, quant_state):
    from bitsandbytes.functional import dequantize_4bit
    assert X.dtype == quant_state.dtype
    assert torch.equal(bits(X), bits(dequantize_4bit(W, quant_state)))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(1024, 2048), (333, 77), (1, 3), (4096, 4096)])
def test_bit_exact(shape, dtype, blocksize, nested):
    W, quant_state = quantized(*shape, dtype, blocksize, nested)
    for _ in range(3):  # the later calls may take a shorter way
        assert_bit_exact(utils.fast_dequantize(W, quant_state), W, quant_state)
        shared = utils.fast_dequantize(W, quant_state, use_global_buffer = True)
        assert_bit_exact(shared, W, quant_state)
    out = torch.empty(shape, dtype = dtype, device = "cuda")
    assert utils.fast_dequantize(W, quant_state, out = out) is out
    assert_bit_exact(out, W, quant_state)
    transposed = utils.fast_dequantize(W.t(), quant_state)
    assert transposed.shape == out.t().shape and torch.equal(transposed, out.t())


@gpu
@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e-39, -0.0, 3e38])
def test_scales_out_of_the_ordinary(scale):
    W, quant_state = quantized(64, 512, torch.bfloat16)
    quant_state.state2.code[::2] = scale
    quant_state.offset.zero_()
    assert_bit_exact(utils.fast_dequantize(W, quant_state), W, quant_state)


@gpu
def test_a_weight_that_moved_is_noticed():
    W, quant_state = quantized(1024, 2048, torch.bfloat16)
    other, other_state = quantized(1024, 2048, torch.bfloat16)
    other.random_(0, 256)
    utils.fast_dequantize(W, quant_state)
    W.data = other.data.clone()
    quant_state.absmax = other_state.absmax.clone().random_(0, 256)
    for _ in range(2):
        assert_bit_exact(utils.fast_dequantize(W, quant_state), W, quant_state)


@gpu
def test_on_a_side_stream_and_in_a_graph():
    W, quant_state = quantized(1024, 2048, torch.bfloat16)
    source = torch.randint_like(W, 0, 256)
    utils.fast_dequantize(W, quant_state)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        W.copy_(source)
        X = utils.fast_dequantize(W, quant_state)
    side.synchronize()
    assert_bit_exact(X, source, quant_state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        X = utils.fast_dequantize(W, quant_state)
    W.random_(0, 256)
    graph.replay()
    assert_bit_exact(X, W, quant_state)
