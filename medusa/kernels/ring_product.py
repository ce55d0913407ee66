"""Products of up to 128 rows on Hopper that keep memory busy: launches ring_product.cu.

Triton's pipelined loops (matmul.py) stream a matrix at nearly the speed of memory for a few rows, but not for 64: the
warps that multiply are those that load. Here a warp of its own loads, by the hardware's tensor copies. Triton has no
stable way to say that, so this one kernel is CUDA's C++, compiled for the shape at run time. Its plain twin is
matmul.py, which every other device takes.

Shapes: M rows of X, N rows of W (columns of the result), K the reduced axis, S splits of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

from medusa.kernels.tiles import RING_COLUMNS, RING_ROWS, RingTiles

AHEAD = 2  # tiles of the matrix asked for before the kernel ahead has ended
SHARED_BYTES = 227 * 1024  # that a program may have on Hopper
_SOURCE = Path(__file__).with_suffix(".cu")
_OPTIONS = [b"-arch=sm_90a", b"-std=c++17"]
_TENSOR_MAP_BYTES = 128  # and they start at multiples of that
_HALF_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Kernel:
    """What the kernel is compiled for."""

    tiles: RingTiles
    warpgroups: int
    halves: int
    pdl: bool
    dtype: torch.dtype

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + 32

    @property
    def shared_bytes(self) -> int:
        tile = (64 * self.warpgroups + self.halves * self.tiles.rows_w) * RING_COLUMNS * 2
        return self.tiles.stages * (tile + 2 * 8)  # and two barriers

    @property
    def source(self) -> str:
        half, tiles = _HALF_TYPES[self.dtype], self.tiles
        defined = {
            "WARPGROUPS": self.warpgroups, "FEATURES": tiles.rows_w, "HALVES": self.halves, "SPLITS": tiles.splits,
            "STAGES": tiles.stages, "AHEAD": AHEAD, "PDL": int(self.pdl), "HALF_TYPE": f'"{half}"',
            "IS_BFLOAT": int(half == "bf16"), "OUT_TYPE": "float" if tiles.splits > 1 else "u16",
        }  # fmt: skip
        lines = [f"#define {name} {value}" for name, value in defined.items()]
        return "\n".join([*lines, _multiply(self.halves * tiles.rows_w, half), _SOURCE.read_text(encoding="utf-8")])


def _multiply(rows_w: int, half: str) -> str:
    """The tensor cores' instruction for 64 rows of X and so many of W: its registers are named one by one."""
    count, address = rows_w // 2, "unsigned long long"
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void multiply(float (&sums)[{count}], {address} x, {address} w) {{"
        f' asm volatile("wgmma.mma_async.sync.aligned.m64n{rows_w}k16.f32.{half}.{half}'
        f' {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;" : {sums} : "l"(x), "l"(w)); }}'
    )


def compiled(kernel: Kernel) -> bytes:
    """The machine code for Hopper; compiled once, then read from Triton's cache on disk."""
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion())
    cache = get_cache_manager(hashlib.sha256(f"{version} {_OPTIONS} {kernel.source}".encode()).hexdigest())
    found = cache.get_file("product.cubin")
    if found is not None:
        return Path(found).read_bytes()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(kernel.source.encode(), _SOURCE.name.encode(), 0, [], []))
    (outcome,) = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), _OPTIONS)
    if outcome != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))[0]
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{kernel} does not compile: {log.decode()}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))[0]
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    cache.put(code, "product.cubin")
    return code


def ring_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    tiles: RingTiles,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed: into out [M, N], or with splits partial sums [S, M, N] in float32.
    `gated`: weight is gate above up [2N, K], and out silu(gate) * up. A bias goes with a whole product only. ValueError
    for tensors or tiles that the kernel does not take."""
    halves = 2 if gated else 1
    (num_rows, size), num_out = x.shape, weight.shape[0] // halves
    kernel = Kernel(tiles, 1 if num_rows <= 64 else 2, halves, pdl, x.dtype)
    _check(x, weight, out, kernel, bias)
    row = weight.stride(0)
    maps = [
        _tensor_map(weight, [size, num_out, halves], [row, num_out * row], [RING_COLUMNS, tiles.rows_w, halves]),
        _tensor_map(x, [size, num_rows], [x.stride(0)], [RING_COLUMNS, 64 * kernel.warpgroups]),
    ]
    others = [
        ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_int(num_rows), ctypes.c_int(num_out), ctypes.c_int(-(-size // RING_COLUMNS)),
        ctypes.c_long(out.stride(-2)), ctypes.c_long(out.stride(0) if tiles.splits > 1 else 0),
    ]  # fmt: skip
    _launch(kernel, x.device.index, (-(-num_out // tiles.rows_w), tiles.splits), [*maps, *others])
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, kernel: Kernel, bias: torch.Tensor | None) -> None:
    tiles = kernel.tiles
    if len(x) > RING_ROWS or x.stride(0) % 8 or x.data_ptr() % 16:
        raise ValueError(
            f"rows of X must be at most {RING_ROWS} and start at multiples of 16 bytes; got {tuple(x.shape)} with"
            f" stride {x.stride(0)}: multiply by `matmul`"
        )
    if tiles.stages < 2 or kernel.shared_bytes > SHARED_BYTES or kernel.halves * tiles.rows_w % 8:
        raise ValueError(
            f"{tiles.stages} tiles of {kernel.halves * tiles.rows_w} rows of W take {kernel.shared_bytes} bytes of"
            f" shared memory; a program has {SHARED_BYTES}, and takes at least 2 tiles of a multiple of 8 rows"
        )
    shares, biased = out.shape[0] if out.dim() == 3 else 1, bias is not None
    if shares != tiles.splits or (biased and (tiles.splits > 1 or kernel.halves > 1)):
        raise ValueError(
            f"{tiles.splits} splits write [S, M, N] without bias, a gated product none either; got out"
            f" {tuple(out.shape)}, bias {biased}"
        )
    wanted = [x.dtype, x.dtype, torch.float32 if tiles.splits > 1 else x.dtype, *[x.dtype] * biased]
    dtypes = [x.dtype, weight.dtype, out.dtype, *([bias.dtype] if bias is not None else [])]
    if x.dtype not in _HALF_TYPES or dtypes != wanted:
        raise ValueError(f"X, W, out and bias must be {wanted}, of 16 bits a value; got {dtypes}")


@dataclass(frozen=True)
class TensorMap:
    """Where the hardware finds tiles. `buffer` keeps the memory of `address` alive."""

    buffer: ctypes.Array[ctypes.c_char]

    @property
    def address(self) -> int:
        start = ctypes.addressof(self.buffer)
        return start + -start % _TENSOR_MAP_BYTES


def _tensor_map(tensor: torch.Tensor, sizes: list[int], strides: list[int], box: list[int]) -> TensorMap:
    """Sizes, strides and the box of a tile in elements, innermost first. What lies outside is read as zero."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    is_bfloat = tensor.dtype == torch.bfloat16
    found = TensorMap(ctypes.create_string_buffer(2 * _TENSOR_MAP_BYTES))
    rank = len(sizes)
    outcome = _encode_tiled()(
        found.address,
        int(kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if is_bfloat else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
        rank, tensor.data_ptr(),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(stride * tensor.element_size() for stride in strides)),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
        int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )  # fmt: skip
    _checked((outcome,))
    return found


@functools.cache
def _encode_tiled() -> Any:
    """The driver's own function: the bindings keep a map wherever Python puts it, and the driver wants it aligned."""
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    function.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    function.restype = number
    return function


def _launch(kernel: Kernel, device: int, grid: tuple[int, int], arguments: list[Any]) -> None:
    """`arguments` are tensor maps and ctypes' values; the driver copies them."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
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
    _checked(driver.cuLaunchKernelEx(config, _loaded(kernel, device), ctypes.addressof(pointers), 0))


@functools.cache
def _loaded(kernel: Kernel, device: int) -> Any:
    """The function on that GPU, in torch's context. Its module lives as long as the process."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        (module,) = _checked(driver.cuModuleLoadData(compiled(kernel)))
        (function,) = _checked(driver.cuModuleGetFunction(module, b"product"))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, limit, kernel.shared_bytes))
    return function


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of CUDA's gave, without its error, which is raised."""
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA refused: {result[0]!r}")
    return result[1:]
