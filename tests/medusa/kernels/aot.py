"""Compiles every Triton kernel of medusa/kernels ahead of time, without a GPU; one JSON line a case, for test_aot.py.

A new kernel needs its configurations here: add them to CASES (see `Case`), with the types of new argument names in
TYPES. A kernel without a case fails the test. Run by hand: `python tests/medusa/kernels/aot.py`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import medusa.kernels
from medusa.kernels.attention import registers
from medusa.kernels.attention_plan import AttentionPlan
from medusa.kernels.matmul import AHEAD_COLUMNS
from medusa.kernels.tiles import Tiles, plan_gated, plan_gated_of, plan_product, plan_quantized
from medusa.quantization import QuantizedWeight

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}

# Types by argument name, shared by the kernels; Case.types overrides. The rest are constexpr (given in `constants`).
POINTERS = {
    "*i32": "ROWS COUNT DEPTH RANK NUM_GUESSED LIVE ROW NODE VALID START MIN_TOKENS NUM_OUTPUT TOP_K REMAINING PARENT "
    "CUT_TOKEN PATH NUM LAST FINISHED TABLES EXACT ARRIVED ASKED SLOT",
    "*i64": "ROOT GUESSES LENGTH TOKENS POSITION STOP SEED CHOICE BEST SAMPLED SAMPLES OUT PAIRS TOKEN_MAP BITS AHEAD",
    "*fp32": "SCALE TEMPERATURE TOP_P MIN_P CUT_VALUE SCORE",
    "*u8": "KEPT",
}
STRIDES = {"plane": "i64"} | dict.fromkeys(
    ["stride_m", "stride_b", "stride_k", "sx", "so", "so_split", "sp_split", "sp", "sr", "sb", "sq", "sc", "ss", "sh"]
    + ["sq_m", "sq_h", "so_m", "so_h"],
    "i32",
)
SIZES = dict.fromkeys(
    ["A", "B", "C", "M", "R", "X", "V", "P", "N", "window", "num_nodes", "num_guessed", "st", "SPLITS", "TILES"], "i32"
)
SCALARS = dict.fromkeys(["eps", "scaling", "softcap"], "fp32")
TYPES = SIZES | SCALARS | STRIDES | {name: kind for kind, names in POINTERS.items() for name in names.split()}


@dataclass(frozen=True)
class Case:
    """One compilation: the kernel as "module.function", its constexpr arguments, and other arguments' types."""

    kernel: str
    constants: dict[str, object]
    types: dict[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, int] = field(default_factory=dict)
    capability: int | None = None  # the only one that it is for

    def source(self, pdl: bool) -> ASTSource:
        function = kernels()[self.kernel]
        constants = self.constants | ({"PDL": pdl} if "PDL" in function.arg_names else {})
        if "AHEAD" in constants:
            constants["AHEAD"] = constants["AHEAD"] if pdl else 0  # prefetching goes with dependent launch
        types = TYPES | self.types
        signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
        places = {name: (place,) for place, name in enumerate(function.arg_names)}
        # What the launcher finds with a real model: aligned memory, strides and vocabularies of multiples of 16.
        aligned = {
            places[name]: [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or (kind != "constexpr" and name in (*STRIDES, "V", "N"))
        }
        return ASTSource(
            fn=function,
            signature=signature,
            constexprs={places[name]: value for name, value in constants.items()},
            attrs=aligned,
        )


def over(
    kernel: str, *, types: dict[str, str] | None = None, num_warps: int = 4, num_stages: int = 3, **choices: object
) -> list[Case]:
    """Cases of all combinations of the listed constants (a bare value is one choice)."""
    lists = [value if isinstance(value, list) else [value] for value in choices.values()]
    return [
        Case(kernel, dict(zip(choices, values, strict=True)), types or {}, num_warps, num_stages)
        for values in itertools.product(*lists)
    ]


@dataclass(frozen=True)
class Model:
    """The sizes of a backbone, as its products and its attention see them."""

    hidden: int
    heads: int
    groups: int
    channels: int
    vocab: int
    head_size: int = 128


MODELS = [
    Model(4096, 32, 32, 11008, 32000),  # Vicuna 7B
    Model(4096, 32, 8, 14336, 128256),  # Llama 3 8B
    Model(6656, 52, 52, 17920, 32000),  # Vicuna 33B
]
SMALL_HEADS, LARGE_HEADS = Model(896, 14, 2, 4864, 151936, 64), Model(3584, 16, 8, 14336, 256000, 256)  # Qwen, Gemma
PROCESSORS = {80: 108, 90: 132}
ROWS = range(1, 257)
MOST_NODES = (1, 4, 16, 64, 512)  # of a sequence: a step's or a prompt's


def products() -> list[Case]:
    """Every product of a step as `plan_product` and `plan_gated` cut it, by number of rows."""
    cases: dict[str, Case] = {}
    for model in MODELS:
        qkv = (model.heads + 2 * model.groups) * model.head_size
        whole = [(qkv, model.hidden), (model.vocab, model.hidden), (4 * model.hidden, model.hidden)]
        partial = [(model.hidden, model.heads * model.head_size), (model.hidden, model.channels)]
        for rows, (out, size) in itertools.product(ROWS, whole + partial):
            tiles = plan_product(rows, out, size, may_split=(out, size) in partial)
            for has_bias in (False, True) if tiles and tiles.splits == 1 else (False,):
                if tiles is not None:
                    case = _product("matmul._matmul", tiles, size, HAS_BIAS=has_bias)
                    cases[str(replace(case, constants=case.constants | {"K": 0, "PER": 0}))] = case
        for rows in ROWS:
            if (tiles := plan_gated(rows)) is not None:
                cases[str(("gated", tiles, model.hidden))] = _product("matmul._gated", tiles, model.hidden)
    return list(cases.values())


def ahead_of(tiles: Tiles) -> int:
    return AHEAD_COLUMNS if tiles.rows_x == 16 else 0


def _product(kernel: str, tiles: Tiles, size: int, **constants: object) -> Case:
    types = {name: "*bf16" for name in ("X", "W", "OUT")} | {"BIAS": "*bf16", "N": "i32"}
    shape: dict[str, object] = {"K": size, "BM": tiles.rows_x, "BN": tiles.rows_w, "BK": tiles.columns}
    if kernel == "matmul._matmul":
        shape["PER"] = triton.cdiv(triton.cdiv(size, tiles.splits), tiles.columns) * tiles.columns
        types["OUT"] = "*fp32" if tiles.splits > 1 else "*bf16"
        if not constants["HAS_BIAS"]:
            constants["BIAS"] = None
    constants = (
        shape | {"SCALE": None, "EVEN": True, "PRECISION": "tf32", "PACKED": True, "AHEAD": ahead_of(tiles)} | constants
    )
    return Case(kernel, constants, types, tiles.warps, tiles.stages)


def attentions() -> list[Case]:
    """Attention as `AttentionPlan.of` cuts it: trees whose keys the launch writes itself or finds, and chains."""
    cases: dict[str, Case] = {}
    models = [*MODELS, SMALL_HEADS, LARGE_HEADS]
    for model, capability, batch, most in itertools.product(models, PROCESSORS, (1, 2, 4, 8, 16, 64, 256), MOST_NODES):
        group = model.heads // model.groups
        for nodes in {batch * most, max(batch, batch * most // 8)}:
            plan = AttentionPlan.of(
                batch_size=batch, num_nodes=nodes, max_nodes=most, chain=most > 128, group=group,
                num_kv_heads=model.groups, head_size=model.head_size, processors=PROCESSORS[capability],
                warpgroups=capability == 90,
            )  # fmt: skip
            for fresh in (False, True) if most <= 128 else (False,):
                cut = replace(plan, splits=plan.splits if plan.merges else min(2, plan.splits), max_nodes=0)
                key = str((capability, model.head_size, group, cut, plan.merges, most > 128, fresh))
                cases.setdefault(key, _attention(model, plan, capability, chain=most > 128, fresh=fresh))
    sizes = dict(batch_size=1, num_nodes=64, max_nodes=64, group=4, num_kv_heads=8, head_size=128, processors=132)
    for capability in PROCESSORS:
        tree = AttentionPlan.of(chain=False, warpgroups=capability == 90, **sizes)
        chain = replace(AttentionPlan.of(chain=True, warpgroups=capability == 90, **sizes), splits=4)
        cases |= {
            f"window {capability}": _attention(MODELS[1], tree, capability, chain=False, fresh=True, window=True),
            f"capped {capability}": _attention(MODELS[0], chain, capability, chain=True, window=True, softcap=True),
        }
    return [
        *cases.values(),
        *over(
            "attention_merge._merge_all", types={"PART": "*fp32", "LSE": "*fp32", "OUT": "*bf16"},
            H=[32, 52], D=128, BD=128, HB=8, SPLITS=[2, 4, 8, 64],
        ),
    ]  # fmt: skip


def _attention(
    model: Model,
    plan: AttentionPlan,
    capability: int,
    *,
    chain: bool,
    fresh: bool = False,
    window: bool = False,
    softcap: bool = False,
) -> Case:
    group = model.heads // model.groups
    constants: dict[str, object] = {
        "H": model.heads, "GROUP": group, "D": model.head_size, "BD": model.head_size, "N": 1 if chain else 64, "W": 1,
        "PAGE": 64, "WHOLE": plan.splits == 1, "MERGED": plan.splits if plan.merges else 0, "BM": plan.rows,
        "BN": plan.columns, "BT": plan.tree_columns, "TEAMS": plan.teams, "CHAIN": chain, "FRESH": fresh,
        "WINDOW": window, "SOFTCAP": softcap, "PRECISION": "tf32",
    }  # fmt: skip
    absent = {"BITS", "DEPTH"} if chain else set()
    absent |= set() if fresh else {"POSITION", "COS", "SIN"}
    bf16 = ("Q", "KEYS", "VALUES", "OUT", "COS", "SIN")
    types = dict.fromkeys(bf16, "*bf16") | {"PART": "*fp32", "LSE": "*fp32"}
    return Case(
        "attention_kernel.attend_tiles", constants | dict.fromkeys(absent), types, plan.warps,
        plan.stages_of(model.head_size, 2), registers(plan), capability,
    )  # fmt: skip


def small_kernels() -> list[Case]:
    """What lies between the products."""
    bf16 = {
        name: "*bf16" for name in ("RESIDUAL", "WEIGHT", "OUT", "BIAS", "QKV", "BOTH", "COS", "SIN", "KEYS", "VALUES")
    }
    cases = over("gate._silu_mul", types=bf16, F=[11008, 17920], BF=1024, num_stages=1)
    for size, block in ((4096, 4096), (6656, 8192)):
        for splits, kind in ((0, "*bf16"), (1, "*bf16"), (2, "*fp32"), (3, "*fp32"), (4, "*fp32")):
            types = bf16 | {"PARTIAL": kind}
            early = [False, True] if splits else False  # with nothing to add it is a step's first
            shape = dict(D=size, S=splits, BD=block, EARLY=early, num_warps=8, num_stages=1)
            cases += over("norm._add_norm", types=types, HAS_BIAS=False, BIAS=None, **shape)
        cases += over("norm._add_norm", types=types, HAS_BIAS=True, **shape)
    for model in (MODELS[0], MODELS[1], MODELS[2]):
        shape = dict(
            H=model.heads, G=model.groups, D=model.head_size, BH=model.head_size // 2, PAGE=64, HB=8,
            HEADS=model.heads + 2 * model.groups, num_stages=1,
        )  # fmt: skip
        cases += over("rope._rope_write", types=bf16, ROTATE=True, NORM=False, QNORM=None, KNORM=None, **shape)
    cases += over(
        "rope._rope_write", types=bf16 | {"QNORM": "*bf16", "KNORM": "*bf16"}, ROTATE=True, NORM=True, **shape
    )
    unrotated = dict.fromkeys(("QNORM", "KNORM", "COS", "SIN", "POSITION"))
    return cases + over("rope._rope_write", types=bf16, ROTATE=False, NORM=False, **unrotated, **shape)


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
    *over("topk._best_of_all", HEADS=4, K=4, S=10, BC=256, MAPPED=[False, True], num_warps=1),
    *over("topk._best_of_all", HEADS=4, K=4, S=32, BC=2048, MAPPED=False),
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
    *over("path._plan_paths", N=64, BN=64, BLOCK=32),
    *over("path._plan_paths", N=64, BN=64, BLOCK=128, num_warps=8),
    *over("path._plan_paths", N=192, BN=256, BLOCK=32, num_warps=8),
    *over("path._read_paths", N=64, S=10, HEAD=[0, 1, 4], BLOCK=32, num_warps=1),
    *over("path._read_paths", N=64, S=10, HEAD=1, BLOCK=32, A=1, C=1, num_warps=1),
    *over("path._take_guesses", N=64, S=10, BLOCK=32, num_warps=1),
    *over(
        "seen._see",
        types=dict.fromkeys(("HIDDEN", "EMBEDDED", "SEEN"), "*bf16"),
        J=[1, 5],
        D=6656,
        BD=8192,
        num_warps=8,
    ),
    *(
        case
        for splits, kind in ((1, "*bf16"), (2, "*fp32"), (3, "*fp32"), (4, "*fp32"))
        for case in over(
            "seen._add_silu",
            types=dict.fromkeys(("BIAS", "RESIDUAL", "OUT"), "*bf16") | {"PARTIAL": kind},
            D=6656,
            S=splits,
            BD=8192,
            SHARING=[1, 4],
            HAS_BIAS=[False, True],
            num_warps=8,
        )
    ),
    *products(),
    *attentions(),
    *small_kernels(),
]


def quantized_cases() -> list[Case]:
    """Products with weights of one byte, of every plan that a 7B model's shapes are given; fp8 is for sm_90 alone."""
    cases: dict[tuple[object, ...], Case] = {}
    types = {"X": "*bf16", "BIAS": "*bf16", "OUT": "*bf16"}
    for values, rows in [*(("*i8", rows) for rows in (1, 17, 33, 65, 129)), ("*fp8e4nv", 1), ("*fp8e4nv", 65)]:
        for (num_out, size), may_split in itertools.product(
            ((6144, 4096), (22016, 4096), (4096, 11008)), (False, True)
        ):
            tiles = plan_quantized(rows, num_out, size, may_split=may_split)
            per = triton.cdiv(triton.cdiv(size, tiles.splits), tiles.columns) * tiles.columns
            constants = tile_constants(tiles) | {"K": size, "PER": per, "HAS_BIAS": not may_split}
            its_types = types | {"W": values} | ({"OUT": "*fp32"} if tiles.splits > 1 else {})
            case = Case("matmul._matmul", constants, its_types, tiles.warps, tiles.stages)
            cases[values, tiles, may_split] = case
        gated = plan_gated_of(
            rows,
            QuantizedWeight(torch.empty(22016, 4096, dtype=torch.int8, device="meta"), torch.ones(1)),
            torch.bfloat16,
        )
        if gated is not None:
            constants = tile_constants(gated) | {"K": 4096}
            cases[values, gated] = Case("matmul._gated", constants, types | {"W": values}, gated.warps, gated.stages)
    return list(cases.values())


def tile_constants(tiles: Tiles) -> dict[str, object]:
    sizes = {"BM": tiles.rows_x, "BN": tiles.rows_w, "BK": tiles.columns}
    return sizes | {"EVEN": True, "PRECISION": "tf32", "PACKED": True, "AHEAD": ahead_of(tiles)}


QUANTIZED_CASES = quantized_cases()


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
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages} | case.options
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
        "order": re.findall(r"griddepcontrol\.(\w+)", compiled.asm["ptx"]),
        "fast_logarithms": compiled.asm["ptx"].count("lg2.approx"),
    }


def largest(cases: list[Case], count: int = 3) -> list[Case]:
    """Of each kernel the cases with the largest blocks, which spill first."""

    def size(case: Case) -> int:
        return math.prod(v for k, v in case.constants.items() if k.startswith("B") and isinstance(v, int) and v > 0)

    chosen: dict[str, list[Case]] = {}
    for case in sorted(cases, key=size, reverse=True):
        chosen.setdefault(case.kernel, []).append(case)
    return [case for of_kernel in chosen.values() for case in of_kernel[:count]]


def compile_on_all(case: Case) -> list[dict[str, object]]:
    """fp8 weights are refused on sm_80 by name (medusa/quantization.py)."""
    only = 90 if case.types.get("W") == "*fp8e4nv" else case.capability
    return [
        compile_case(case, capability, pdl=capability == 90) for capability in (80, 90) if only in (capability, None)
    ]


def main() -> None:
    """Prints the kernels and those listed, then every compilation; `--largest` compiles a few cases of each kernel, and
    names of kernels only theirs."""
    every, asked = CASES + QUANTIZED_CASES, sys.argv[1:]
    print(json.dumps({"kernels": sorted(kernels()), "listed": sorted({case.kernel for case in every})}))
    if asked == ["--largest"]:
        every = largest(CASES) + largest(QUANTIZED_CASES)
    elif asked:
        every = [case for case in every if case.kernel in asked]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for compilations in pool.map(compile_on_all, every):
            for compilation in compilations:
                print(json.dumps(compilation), flush=True)


if __name__ == "__main__":
    main()
