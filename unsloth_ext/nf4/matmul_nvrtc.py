"""CUDA C++ of `cuda/` to machine code by NVRTC, the compiler among the CUDA libraries that torch brings along.

It needs neither a toolkit nor headers and takes about 0.6 s a kernel; the result is kept in the user's cache folder. The interface
is NVIDIA's: https://docs.nvidia.com/cuda/nvrtc/.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from ..cache import cache_dir
from ..errors import UsageError

SOURCES = Path(__file__).parent / "cuda"
_HASH = 32  # bytes before the code in a kept file


def source(kernel: str) -> str:
    """The whole text of a kernel, with what it includes."""
    included = (SOURCES / "common.cuh").read_text().replace("#pragma once", "")
    return (SOURCES / f"{kernel}.cu").read_text().replace('#include "common.cuh"', included)


def _places(name: str):
    spec = find_spec("nvidia")  # the wheels that torch depends on
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(map(str, Path(folder).glob(f"*/lib/{name}")))
    yield from sorted(map(str, Path(torch.__file__).parent.glob(f"lib/{name.replace('.so', '*.so')}*")))
    yield name  # loaded already, or where the system looks
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if folder:
            yield os.path.join(folder, "lib64", name)


@functools.cache
def library():
    """(NVRTC, its version) of torch's own CUDA release. Raises OSError where there is none."""
    name = f"libnvrtc.so.{(torch.version.cuda or '0').split('.')[0]}"
    for place in _places(name):
        try:
            # NVRTC looks for its other library by name only, and finds it where that is loaded already.
            for other in sorted(Path(place).parent.glob("libnvrtc-builtins.so*")) if os.sep in place else ():
                ctypes.CDLL(str(other))
            nvrtc = ctypes.CDLL(place)
        except OSError:
            continue
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return nvrtc, f"{major.value}.{minor.value}"
    raise OSError(f"{name} was not found: it comes with torch's CUDA wheels, or with a CUDA toolkit")


def _compiled(text: str, name: str, options: list[str]) -> bytes:
    nvrtc, _ = library()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    if code:
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")
    try:
        flags = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        code = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        if code:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            why = nvrtc.nvrtcGetErrorString(code).decode()
            raise RuntimeError(f"NVRTC: {why} in {name}: {log.value.decode(errors='replace')[:400]}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        code = nvrtc.nvrtcGetCUBIN(program, image)
        if code or not size.value:
            raise RuntimeError(f"NVRTC gave no machine code for {name} (error {code})")
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cubin(kernel: str, macros: dict, arch: str = "sm_90a") -> bytes:
    """The machine code of `cuda/<kernel>.cu` with these macros, from the cache folder or from NVRTC.

    Raises OSError where there is no NVRTC and RuntimeError where it does not compile. A cache folder that cannot be used,
    or a kept file that is not whole, costs time only.
    """
    _, version = library()
    options = [f"-arch={arch}", "-default-device", *(f"-D{name}={value}" for name, value in sorted(macros.items()))]
    text = source(kernel)
    key = hashlib.sha256("\0".join((text, *options, version)).encode()).hexdigest()[:32]
    folder = _own_folder()
    kept = None if folder is None else folder / f"{kernel}-{key}.cubin"
    if kept is not None:
        try:
            whole = kept.read_bytes()
            if hashlib.sha256(whole[_HASH:]).digest() == whole[:_HASH]:
                return whole[_HASH:]
        except OSError:
            pass
    image = _compiled(text, f"{kernel}.cu", options)
    if kept is not None:
        _keep(kept, hashlib.sha256(image).digest() + image)
    return image


def _own_folder() -> Path | None:
    """A folder that is the user's and that nobody else can write to: what lies there will be run. None where that cannot be had."""
    try:
        folder = cache_dir("nf4", "cubin")
        if folder.stat().st_uid != os.geteuid():
            return None
        folder.chmod(0o700)
        return folder
    except (OSError, UsageError):
        return None


def _keep(path: Path, content: bytes) -> None:
    """Whole or not at all, whoever else is writing."""
    try:
        number, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".cubin")
    except OSError:
        return
    try:
        with open(number, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
