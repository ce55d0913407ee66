"""What the kernels in CUDA's C++ share: sources, compilation for Hopper without a GPU, code kept on disk, tensor maps,
launches. The driver's functions are stood in for; the kernels' own tests launch them on a Hopper GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from medusa.kernels import hopper
from medusa.kernels.hopper import TensorMap, compiled, has_compiler, launch, source_of, tensor_map

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="NVIDIA's bindings or compiler are missing")
SHARED = "using u16 = unsigned short;\n"
STORES = 'extern "C" __global__ void constant(u16* out) { *out = value() + IS_BFLOAT; }\n'
VALUE = "__device__ u16 value() { return VALUE; }"


@dataclass(frozen=True)
class Constant:
    """A kernel that stores a number."""

    value: int = 7
    dtype: torch.dtype = torch.bfloat16
    pdl: bool = False
    threads: int = 96
    shared_bytes: int = 4096

    @property
    def name(self) -> str:
        return "constant"

    @property
    def source(self) -> str:
        return source_of(self.name, {"VALUE": self.value}, self.dtype, VALUE)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where sources are read from, with the cache of what is compiled beside them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hopper, "_FOLDER", tmp_path)
    (tmp_path / "hopper.cuh").write_text(SHARED, encoding="utf-8")
    (tmp_path / "constant.cu").write_text(STORES, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "half", "is_bfloat"), [(torch.bfloat16, '"bf16"', "1"), (torch.float16, '"f16"', "0")]
)
def test_a_source_is_what_is_defined_then_what_is_shared_then_functions_then_the_file(dtype, half, is_bfloat, folder):
    defined = f"#define VALUE 7\n#define HALF_TYPE {half}\n#define IS_BFLOAT {is_bfloat}\n"
    assert Constant(dtype=dtype).source == f"{defined}{SHARED}\n{VALUE}\n{STORES}"


@pytest.mark.parametrize("missing", [ImportError("no module named cuda"), RuntimeError("libnvrtc.so.13 not found")])
def test_a_missing_compiler_is_told_of_once(missing, monkeypatch, caplog):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

    def version():
        raise missing

    monkeypatch.setattr(nvrtc, "nvrtcVersion", version)
    has_compiler.cache_clear()
    try:
        assert [has_compiler() for _ in range(2)] == [False, False]
    finally:
        has_compiler.cache_clear()
    assert [str(missing) in record.message and "extra `gpu`" in record.message for record in caplog.records] == [True]


@needs_compiler
def test_compiled_code_is_kept_on_disk(folder, monkeypatch):
    from cuda.bindings import nvrtc

    code, compilations, compile_program = compiled(Constant()), [], nvrtc.nvrtcCompileProgram
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(
        nvrtc, "nvrtcCompileProgram", lambda *given: compilations.append(given) or compile_program(*given)
    )
    assert compiled(Constant()) == code and not compilations
    others = [compiled(Constant(value=8)), compiled(Constant(dtype=torch.float16))]
    (folder / "hopper.cuh").write_text("using u16 = unsigned int;\n", encoding="utf-8")
    others.append(compiled(Constant()))  # what is shared is part of the source
    assert len(compilations) == 3 and code not in others


@needs_compiler
def test_what_does_not_compile_says_why(folder):
    (folder / "constant.cu").write_text("int product( {", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"Constant.* does not compile: constant.cu\(\d+\): error"):
        compiled(Constant())


@needs_compiler
def test_tensor_maps_are_aligned_and_describe_bytes(monkeypatch):
    """The driver's own function takes the place of which one that writes down what it is given."""
    seen = []

    def encode(address, kind, rank, tensor, sizes, strides, box, steps, *modes):
        seen.append((address, kind, tensor, sizes[:rank], strides[: rank - 1], box[:rank], steps[:rank], modes))
        return 1 if tensor == 0 else 0

    monkeypatch.setattr(hopper, "_encode_tiled", lambda: encode)
    x = torch.zeros(40, 4160, dtype=torch.bfloat16)
    maps = [tensor_map(x, [4096, 40], [4160], [64, 64]) for _ in range(8)]
    assert {found.address % 128 for found in maps} == {0} and len({found.address for found in maps}) == 8
    for found in maps:
        start = ctypes.addressof(found.buffer)
        assert start <= found.address <= start + len(found.buffer) - 128
    address, kind, tensor, sizes, strides, box, steps, modes = seen[0]
    assert (address, tensor, kind, modes) == (maps[0].address, x.data_ptr(), 9, (0, 3, 3, 0))
    assert (sizes, strides, box, steps) == ([4096, 40], [8320], [64, 64], [1, 1])
    with pytest.raises(RuntimeError, match="CUDA refused: 1"):
        tensor_map(torch.zeros(0, 8, dtype=torch.float16), [8, 1], [8], [64, 64])
    assert seen[-1][1] == 6  # float16


@pytest.fixture
def launched(monkeypatch):
    """What the driver is asked to launch: its configuration, the function, and where the arguments lie. The values of
    integers must be read while it is asked, as the driver does."""
    driver = pytest.importorskip("cuda.bindings.driver")
    asked = []

    def launch_kernel(config, function, arguments, extra):
        first, second = (ctypes.c_void_p * 2).from_address(arguments)
        asked.append((config, function, first, ctypes.c_int.from_address(second).value, extra))
        refused = function == "refused"
        return (driver.CUresult.CUDA_ERROR_INVALID_VALUE if refused else driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch_kernel)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1000 + device))
    monkeypatch.setattr(hopper, "_loaded", lambda kernel, device: "refused" if kernel.value == 0 else (kernel, device))
    return asked


@pytest.mark.parametrize("pdl", [False, True])
def test_a_launch_hands_over_where_its_arguments_lie(pdl, launched):
    kernel, found = Constant(pdl=pdl), TensorMap(ctypes.create_string_buffer(256))
    launch(kernel, 3, (5, 4, 2), [found, ctypes.c_int(-12)])
    ((config, function, first, second, extra),) = launched
    assert (function, first, second, extra) == ((kernel, 3), found.address, -12, 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (5, 4, 2)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (96, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream)) == (4096, 1003)
    dependent = [(each.id.name, each.value.programmaticStreamSerializationAllowed) for each in config.attrs]
    assert dependent == ([("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION", 1)] if pdl else [])
    assert config.numAttrs == len(dependent)


def test_a_launch_that_the_driver_refuses_is_told_of(launched):
    with pytest.raises(RuntimeError, match="CUDA refused: .*CUDA_ERROR_INVALID_VALUE"):
        launch(Constant(value=0), 0, (1, 1, 1), [TensorMap(ctypes.create_string_buffer(256)), ctypes.c_int(1)])
    assert len(launched) == 1
