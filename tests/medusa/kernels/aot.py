"""Compiles every Triton kernel of medusa/kernels ahead of time, without a GPU; one JSON line a case, for test_aot.py.

A new kernel needs its configurations here: add them to CASES (see `Case`), with the types of new argument names in
TYPES. A kernel without a case fails the test. Run by hand: `python tests/medusa/kernels/aot.py`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import medusa.kernels

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}

# Types by argument name, shared by the kernels; Case.types overrides. The rest are constexpr (given in `constants`).
POINTERS = {
    "*i32": "ROWS COUNT DEPTH RANK NUM_GUESSED LIVE ROW NODE VALID START MIN_TOKENS NUM_OUTPUT TOP_K REMAINING PARENT "
    "CUT_TOKEN PATH NUM LAST FINISHED TABLES EXACT",
    "*i64": "ROOT GUESSES LENGTH TOKENS POSITION STOP SEED CHOICE BEST SAMPLED SAMPLES OUT PAIRS TOKEN_MAP BITS",
    "*fp32": "TEMPERATURE TOP_P MIN_P CUT_VALUE SUMS LOGPROB SCORE",
    "*u8": "KEPT",
}
STRIDES = {"stride_m": "i32", "stride_b": "i32", "stride_k": "i32", "plane": "i64"}
SIZES = dict.fromkeys(["B", "M", "R", "X", "V", "P"], "i32")
TYPES = SIZES | STRIDES | {name: kind for kind, names in POINTERS.items() for name in names.split()}


@dataclass(frozen=True)
class Case:
    """One compilation: the kernel as "module.function", its constexpr arguments, and other arguments' types."""

    kernel: str
    constants: dict[str, object]
    types: dict[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def source(self, pdl: bool) -> ASTSource:
        function = kernels()[self.kernel]
        constants = self.constants | ({"PDL": pdl} if "PDL" in function.arg_names else {})
        types = TYPES | self.types
        signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
        places = {name: (place,) for place, name in enumerate(function.arg_names)}
        # What the launcher finds with a real model: aligned memory, strides and vocabularies of multiples of 16.
        aligned = {
            places[name]: [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or name in (*STRIDES, "V")
        }
        return ASTSource(
            fn=function,
            signature=signature,
            constexprs={places[name]: value for name, value in constants.items()},
            attrs=aligned,
        )


def over(kernel: str, *, types: dict[str, str] | None = None, num_warps: int = 4, **choices: object) -> list[Case]:
    """Cases of all combinations of the listed constants (a bare value is one choice)."""
    lists = [value if isinstance(value, list) else [value] for value in choices.values()]
    return [
        Case(kernel, dict(zip(choices, values, strict=True)), types or {}, num_warps)
        for values in itertools.product(*lists)
    ]


SHIFTS = {"*bf16": 16, "*fp16": 13, "*fp32": 0}
CASES: list[Case] = [
    *over("draft._draft", N=[64, 192], K=4, S=10, BB=[16, 128], BLOCK=32),
    *(
        case
        for logits, shift in SHIFTS.items()
        for case in [
            *over("sample._sample", types={"LOGITS": logits}, E=4, GREEDY=False, BLOCK=1024),
            *over("cut._cut", types={"LOGITS": logits}, E=4, SHIFT=shift, BLOCK=4096, num_warps=16),
            *over("topk._best_of_split", types={"LOGITS": logits}, K=4, S=10, BLOCK=2048),
        ]
    ),
    *over("sample._sample", types={"LOGITS": "*bf16"}, E=4, GREEDY=True, BLOCK=1024),
    *over("topk._best_of_split", types={"LOGITS": "*bf16"}, K=4, S=32, BLOCK=2048),
    *over("topk._best_of_all", HEADS=4, K=4, S=10, BX=16, BC=256, MAPPED=[False, True], num_warps=1),
    *over("topk._best_of_all", HEADS=4, K=4, S=32, BX=64, BC=2048, MAPPED=False),
    *over("sample._reduce", BM=16, BX=[1, 32]),
    *over("walk._walk", N=64, BN=64, E=4, D=5, BX=32, BD=8, BE=4, PACKED=[True, False], num_warps=1),
    *over("walk._walk", N=192, BN=256, E=4, D=5, BX=32, BD=8, BE=4, PACKED=True, num_warps=1),
    *over("walk._walk_typical", N=64, BN=64, E=4, D=5, BD=8, BE=4, num_warps=1),
    *over("walk._walk_typical", N=192, BN=256, E=4, D=5, BD=8, BE=4),
    *(
        case
        for element in ("*bf16", "*fp32")
        for case in over(
            "compact._compact", types={"CACHE": element}, D=5, BD=8, PAGE=64, SIZE=[1024, 4096], BLOCK=1024, num_warps=8
        )
    ),
    *over("compact._compact", types={"CACHE": "*bf16"}, D=9, BD=16, PAGE=64, SIZE=4096, BLOCK=512, num_warps=8),
    *over("growth._grow", N=64, BN=64, BW=1, K=4, S=10, num_warps=1),
    *over("growth._grow", N=192, BN=256, BW=4, K=4, S=10, num_warps=1),
]


def kernels() -> dict[str, JITFunction]:
    """Every kernel of medusa/kernels: the jitted functions defined there that are no other's helper."""
    found: dict[str, JITFunction] = {}
    called: set[str] = set()
    for module in pkgutil.iter_modules(medusa.kernels.__path__):
        source = Path(module.module_finder.path, f"{module.name}.py").read_text(encoding="utf-8")
        if "import triton" not in source:
            continue
        for name, value in vars(importlib.import_module(f"medusa.kernels.{module.name}")).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == f"medusa.kernels.{module.name}":
                found[f"{module.name}.{name}"] = value
                called |= set(re.findall(r"(?<!def )\b(\w+)\(", value.src))
    return {name: value for name, value in found.items() if name.split(".")[1] not in called}


def compile_case(case: Case, capability: int, pdl: bool) -> dict[str, object]:
    """Shared memory, registers and spilled bytes of one compilation, the last two from ptxas."""
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(case.source(pdl), target=GPUTarget("cuda", capability, 32), options=options)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"-arch={ARCHITECTURES[capability]}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": case.kernel,
        "constants": {name: str(value) for name, value in case.constants.items()},
        "capability": capability,
        "pdl": pdl,
        "shared": compiled.metadata.shared,
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "waits": compiled.asm["ptx"].count("griddepcontrol.wait"),
        "fast_logarithms": compiled.asm["ptx"].count("lg2.approx"),
    }


def main() -> None:
    listed = {case.kernel for case in CASES}
    print(json.dumps({"kernels": sorted(kernels()), "listed": sorted(listed)}))
    for case in CASES if not sys.argv[1:] else [case for case in CASES if case.kernel in sys.argv[1:]]:
        for capability, pdl in ((80, False), (90, True)):
            print(json.dumps(compile_case(case, capability, pdl)), flush=True)


if __name__ == "__main__":
    main()
