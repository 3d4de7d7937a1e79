"""The matmul kernels in CUDA C++ without a card: their choice, NVRTC and its cache, the launch block, and themselves as fibers on a CPU."""

import ctypes
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from unsloth_ext.nf4 import matmul_cuda, matmul_hopper, matmul_nvrtc, matmul_table
from unsloth_ext.nf4.matmul_hopper import FewRows, Tiles, cut, shape_for
from unsloth_ext.nf4.quant_state import NF4State

HERE = Path(__file__).parent / "on_host"
DIMENSIONS = (64, 896, 1024, 1536, 2048, 3072, 3584, 4096, 5120, 8192, 11008, 14336, 18944, 27648, 28672)


def test_what_is_chosen_fits():
    seen = set()
    for n in DIMENSIONS:
        for k in DIMENSIONS:
            for rows in (*range(1, 18), 32, 33, 64, 65, 128, 129):
                shape = shape_for(rows, n, k, 132)
                if shape is None:
                    continue
                seen.add(type(shape))
                assert rows <= shape.rows <= 128 and shape.end <= matmul_hopper._LIMIT and shape.threads <= 1024
                if isinstance(shape, FewRows):
                    assert 256 * shape.kw * shape.slices == k and shape.kw * shape.rg <= 16
                    assert not shape.shared_sums or -(-n // (16 * shape.rg)) <= matmul_hopper.COUNTERS
                else:
                    assert k % (64 * shape.parts) == 0 and k // (64 * shape.parts) >= shape.split
                    assert -(-n // (64 * shape.nwg)) <= matmul_hopper.COUNTERS
    assert seen == {FewRows, Tiles}
    assert shape_for(1, 4096, 4096, 132).groups == 1 and shape_for(9, 4096, 4096, 132).groups == 2
    assert cut(4096) == (16, 1, 1) and cut(2048) == (8, 2, 1) and cut(14336) == (14, 1, 4) and cut(896) is None


@pytest.mark.parametrize("rows", [65, 128, 129, 256])
def test_many_rows_where_they_fill_a_card(rows):
    """In Triton where a weight has rows enough for all processors; splitting K for others lost to dequantise and cuBLAS."""
    for n, k in ((14336, 4096), (28672, 8192)):
        found = matmul_table._many(rows, n, k, 64)
        assert found.split == 1 and found.block_m >= rows
    for n, k in ((4096, 4096), (8192, 8192), (8192, 28672), (4096, 14336), (1024, 8192)):
        assert matmul_table._many(rows, n, k, 64) is None


def test_who_takes_which_state(monkeypatch):
    """Only sm_90 and bitsandbytes' usual state; the switch is read once for each card."""
    monkeypatch.setattr(matmul_table, "enabled", lambda index: True)
    monkeypatch.setattr(matmul_nvrtc, "library", lambda: (None, "13.0"))
    for capability, wanted, expected in (((9, 0), "", True), ((9, 0), "triton", False), ((8, 0), "", False)):
        monkeypatch.setattr(matmul_table, "capability", lambda index, found=capability: found)
        monkeypatch.setenv("UNSLOTH_EXT_NF4_MATMUL", wanted)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: type("", (), {"multi_processor_count": 132})
        )
        matmul_table.processors.cache_clear()
        try:
            for blocksize, blocksize2 in ((64, 256), (128, 256), (64, 128), (64, 0)):
                code = torch.zeros(256) if blocksize2 else None
                state = NF4State(
                    None, torch.Size([4096, 4096]), torch.bfloat16, blocksize, code, None, None, blocksize2
                )
                for rows in (1, 16, 40):
                    found = matmul_table.variant_for(0, torch.bfloat16, rows, state, False)
                    assert found.cuda == (expected and (blocksize, blocksize2) == (64, 256))
                    assert not matmul_table.variant_for(0, torch.bfloat16, rows, state, False, cuda=False).cuda
        finally:
            matmul_table.processors.cache_clear()


def test_the_launch_block():
    """What the driver reads: CUlaunchConfig, one attribute, and an array of pointers to the arguments."""
    seen = []
    call = matmul_cuda._Function.__new__(matmul_cuda._Function)
    call.threads, call.shared, call.function, call.count, call.free = 512, 99, None, 3, []
    call.at, call.pack_into = len(matmul_cuda._OVERLAP), struct.Struct(matmul_cuda.CONFIG + "Qi4xf4x").pack_into

    def launch(config, function, pointers, extra):
        first = ctypes.string_at(config, 56)
        attributes = struct.unpack_from("<Q", first, 40)[0]
        addresses = (ctypes.c_uint64 * 3).from_address(pointers)
        values = tuple(
            kind.from_address(at).value
            for kind, at in zip((ctypes.c_uint64, ctypes.c_int, ctypes.c_float), addresses, strict=True)
        )
        seen.append(
            (struct.unpack_from("<7I4xQ", first), struct.unpack_from("<I4xI", ctypes.string_at(attributes, 72)), values)
        )
        return 0

    call.launch = launch
    for stream in (0, 7):
        call(3, 2, 1, stream, 2**40 + 5, -6, 0.5)
    assert seen == [((3, 2, 1, 512, 1, 1, 99, stream), (6, 1), (2**40 + 5, -6, 0.5)) for stream in (0, 7)]
    assert len(call.free) == 1  # the second call took the first one's block


@pytest.fixture
def nvrtc():
    """torch's own, or that of any CUDA release where torch has none."""
    try:
        matmul_nvrtc.library()
    except OSError as error:
        pytest.skip(str(error))


def test_nvrtc_and_its_cache(nvrtc, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_EXT_CACHE", str(tmp_path))
    for shape, k in ((FewRows("few_async", 2, 8, 2), 2048), (Tiles(16), 2048)):
        macros = shape.macros(k) | {"FP16": 1}
        image = matmul_nvrtc.cubin(shape.kernel, macros)
        assert image[:4] == b"\x7fELF" and shape.kernel.encode() in image
        (kept,) = tmp_path.glob(f"nf4/cubin/{shape.kernel}-*.cubin")
        assert kept.stat().st_mode & 0o077 == 0 and kept.parent.stat().st_mode & 0o077 == 0
        with monkeypatch.context() as patched:
            patched.setattr(matmul_nvrtc, "_compiled", None)  # it need not be asked again
            assert matmul_nvrtc.cubin(shape.kernel, macros) == image
        kept.write_bytes(kept.read_bytes()[:-100])  # not whole
        assert matmul_nvrtc.cubin(shape.kernel, macros) == image
    assert matmul_nvrtc.cubin("few_async", FewRows("few_async", 1, 8, 2).macros(2048)) != image
    with pytest.raises(RuntimeError, match="few_async.cu"):
        matmul_nvrtc.cubin("few_async", {"GROUPS": "nonsense"})


def test_a_folder_that_cannot_be_used_costs_time_only(nvrtc, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNSLOTH_EXT_CACHE", str(tmp_path / "file"))
    assert matmul_nvrtc._own_folder() is None
    assert matmul_nvrtc.cubin("tile_wgmma", Tiles(16).macros(1024))[:4] == b"\x7fELF"


def test_without_nvrtc(monkeypatch):
    monkeypatch.setattr(matmul_nvrtc, "_places", lambda name: iter(["/nowhere/libnvrtc.so.0"]))
    matmul_nvrtc.library.cache_clear()
    try:
        with pytest.raises(OSError, match="was not found"):
            matmul_nvrtc.cubin("few_async", {})
        monkeypatch.setattr(matmul_table, "capability", lambda index: (9, 0))
        monkeypatch.delenv("UNSLOTH_EXT_NF4_MATMUL", raising=False)
        matmul_table.processors.cache_clear()
        with pytest.warns(RuntimeWarning, match="was not found") as warned:  # once, and Triton's kernels are instead
            assert [matmul_table.processors(0) for _ in range(3)] == [0, 0, 0]
        assert len(warned) == 1
    finally:
        matmul_nvrtc.library.cache_clear()
        matmul_table.processors.cache_clear()


# (kernel, its macros, rows of x). Small, but with more items than stages, last tiles that are not whole, and shared sums.
ON_HOST = [
    (1, {"KW": 8, "RG": 2}, 7),
    (1, {"KW": 7, "SLICES": 2, "GROUPS": 2, "AHEAD": 1, "STAGES": 2}, 13),
    (1, {"KW": 5, "RG": 2, "SLICES": 3, "INNER": 1, "AHEAD": 1}, 8),
    (2, {"KW": 16, "AHEAD": 1}, 3),
    (2, {"KW": 7, "SLICES": 2, "GROUPS": 2}, 16),
    (3, {"MT": 16, "PARTS": 4, "STAGES": 3, "KDIM": 2048, "SPLIT": 2}, 9),
    (3, {"MT": 32, "PARTS": 2, "STAGES": 3, "KDIM": 1024, "LEAN": 1, "BUFFERS": 1, "DECODED": 1, "NWG": 1}, 40),
    (3, {"MT": 32, "PARTS": 2, "STAGES": 4, "KDIM": 1024, "SPLIT": 4, "WORDS": 1}, 27),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("kernel, macros, rows", ON_HOST, ids=lambda value: str(value).replace(" ", ""))
def test_on_a_cpu(kernel, macros, rows, tmp_path):
    # A longjmp that is fortified refuses to go to another stack.
    command = ["g++", "-std=c++20", "-O1", "-w", "-U_FORTIFY_SOURCE", "-DHOST", f"-I{HERE}", f"-DKERNEL={kernel}"]
    command += [
        *(f"-D{name}={value}" for name, value in macros.items()),
        str(HERE / "run.cpp"),
        "-o",
        str(tmp_path / "run"),
    ]
    subprocess.run(command, check=True, timeout=300)
    seed, blocks = random.randrange(1 << 30), random.choice((1, 2, 3))
    done = subprocess.run(
        [str(tmp_path / "run"), str(rows), "100", str(blocks), str(seed)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (seed, done.stdout, done.stderr)
