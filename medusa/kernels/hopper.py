"""Kernels in CUDA's C++ for Hopper: compiled for a shape at run time, cached on disk, and launched.

Triton has no stable way to say that a warp of its own loads by the hardware's tensor copies. The few kernels that gain
by it have a plain twin in Triton, which every other device takes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from triton.runtime.cache import get_cache_manager

logger = logging.getLogger(__name__)

SHARED_BYTES = 227 * 1024  # that a program may have
ROW_COLUMNS = 64  # of a tile in shared memory: 128 bytes of 16-bit numbers, a row of the swizzled layout
HALF_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_FOLDER = Path(__file__).parent
_OPTIONS = [b"-arch=sm_90a", b"-std=c++17"]
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_TENSOR_MAP_BYTES = 128  # and they start at multiples of that


class Kernel(Protocol):
    """What a kernel is compiled for; hashable."""

    @property
    def name(self) -> str:
        """Of the function, and of its file `name`.cu."""
        ...

    @property
    def source(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...

    @property
    def pdl(self) -> bool:
        """Whether it may start while the kernel ahead of it ends."""
        ...

    def __hash__(self) -> int: ...


def source_of(name: str, defined: dict[str, int | str], dtype: torch.dtype, *functions: str) -> str:
    """The text to compile: what is defined, what kernels share, functions written for the shape, and the file with the
    parts that it includes."""
    half = HALF_TYPES[dtype]
    defined = {**defined, "HALF_TYPE": f'"{half}"', "IS_BFLOAT": int(half == "bf16")}
    lines = [f"#define {key} {value}" for key, value in defined.items()]
    return "\n".join([*lines, _text("hopper.cuh"), *functions, _text(f"{name}.cu")])


def _text(file: str) -> str:
    text = (_FOLDER / file).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: _text(found[1]), text)


@functools.cache
def has_compiler() -> bool:
    """Whether NVIDIA's bindings and the compiler behind them are installed; says once where they are not."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the bindings find no library
        logger.warning("steps are slower here: no NVRTC (%s); install the extra `gpu`", error)
        return False
    return True


def compiled(kernel: Kernel) -> bytes:
    """The machine code for Hopper; compiled once, then read from Triton's cache on disk."""
    from cuda.bindings import nvrtc

    version = checked(nvrtc.nvrtcVersion())
    cache = get_cache_manager(hashlib.sha256(f"{version} {_OPTIONS} {kernel.source}".encode()).hexdigest())
    file = f"{kernel.name}.cubin"
    found = cache.get_file(file)
    if found is not None:
        return Path(found).read_bytes()
    (program,) = checked(nvrtc.nvrtcCreateProgram(kernel.source.encode(), f"{kernel.name}.cu".encode(), 0, [], []))
    (outcome,) = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), _OPTIONS)
    if outcome != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))[0]
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{kernel} does not compile: {log.decode()}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))[0]
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    cache.put(code, file)
    return code


@dataclass(frozen=True)
class TensorMap:
    """Where the hardware finds tiles. `buffer` keeps the memory of `address` alive."""

    buffer: ctypes.Array[ctypes.c_char]

    @property
    def address(self) -> int:
        start = ctypes.addressof(self.buffer)
        return start + -start % _TENSOR_MAP_BYTES


def tensor_map(tensor: torch.Tensor, sizes: list[int], strides: list[int], box: list[int]) -> TensorMap:
    """Sizes, strides and the box of a tile in elements of 16 bits or one byte, innermost first. What lies outside is
    read as zero."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.int8: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }[tensor.dtype]
    found = TensorMap(ctypes.create_string_buffer(2 * _TENSOR_MAP_BYTES))
    rank = len(sizes)
    outcome = _encode_tiled()(
        found.address, int(kind), rank, tensor.data_ptr(),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(stride * tensor.element_size() for stride in strides)),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )  # fmt: skip
    checked((outcome,))
    return found


@functools.cache
def _encode_tiled() -> Any:
    """The driver's own function: the bindings keep a map wherever Python puts it, and the driver wants it aligned."""
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    function.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    function.restype = number
    return function


def launch(kernel: Kernel, device: int, grid: tuple[int, int, int], arguments: list[Any]) -> None:
    """`arguments` are tensor maps and ctypes' values; the driver copies them."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes = kernel.shared_bytes
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    if kernel.pdl:
        dependent = driver.CUlaunchAttribute()
        dependent.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        dependent.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [dependent], 1
    addresses = [a.address if isinstance(a, TensorMap) else ctypes.addressof(a) for a in arguments]
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    checked(driver.cuLaunchKernelEx(config, _loaded(kernel, device), ctypes.addressof(pointers), 0))


@functools.cache
def _loaded(kernel: Kernel, device: int) -> Any:
    """The function on that GPU, in torch's context. Its module lives as long as the process."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        (module,) = checked(driver.cuModuleLoadData(compiled(kernel)))
        (function,) = checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, limit, kernel.shared_bytes))
    return function


def checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of CUDA's gave, without its error, which is raised."""
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA refused: {result[0]!r}")
    return result[1:]
