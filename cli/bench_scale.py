"""`medusa bench scale`: what more workers give, measured by benchmarks/scaling/.

`python -m cli.bench_scale` is the same where not all packages of the project are installed.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cli.cluster import ray_cluster

NVLS = "NCCL_NVLS_ENABLE"


def scale(
    workers: Annotated[str, typer.Option(help="Numbers of workers, comma-separated; 1 among them.")] = "1,2,4",
    parts: Annotated[
        str, typer.Option(help="Of ray, distill, medusa-1, medusa-2, serve, autoscale, tensor-parallel; default: all.")
    ] = "",
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = "models/chat-8m",
    heads: Annotated[str | None, typer.Option(help="Medusa heads to distil and serve with; else plainly.")] = None,
    inflate: Annotated[
        str | None, typer.Option(help="Embed model and heads in a larger shape first (kept in --out): vicuna-7b, ...")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts to distil; default: the demo's.")] = None,
    rows: Annotated[int, typer.Option(help="Prompts to distil, an actor.")] = 256,
    max_batch_size: Annotated[int, typer.Option(help="Replies decoded at once, an engine.")] = 64,
    reply_tokens: Annotated[int, typer.Option(help="The longest distilled reply; the mean of served ones.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Length of served prompts.")] = 128,
    concurrency: Annotated[str, typer.Option(help="Requests at once a replica, comma-separated.")] = "1,16,64",
    batch: Annotated[int, typer.Option(help="Training rows a step, a worker.")] = 8,
    length: Annotated[int, typer.Option(help="The longest training row.")] = 2048,
    steps: Annotated[int, typer.Option(help="Training steps a timed window.")] = 5,
    num_heads: Annotated[int, typer.Option(help="Heads to train.")] = 4,
    joint_method: Annotated[str, typer.Option(help="Medusa-2: lora or full.")] = "lora",
    upscale_delay: Annotated[float, typer.Option(help="Autoscaling: seconds a higher load must last.")] = 10.0,
    repeats: Annotated[int, typer.Option(help="Runs or windows of each figure.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the engine's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    kv_cache_gb: Annotated[float | None, typer.Option(help="Memory of each engine's KV cache.")] = None,
    time_budget: Annotated[float | None, typer.Option(help="Seconds for all parts, shared out among them.")] = None,
    part_limit: Annotated[float, typer.Option(help="Seconds for each part, at most.")] = 600.0,
    again: Annotated[bool, typer.Option("--again", help="Measure parts again that stand in --out.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of scale.json, scale.md and scale.png.")] = Path("runs/bench/scale"),
) -> None:
    """Measures distillation, training, serving and tensor parallelism by number of workers, one GPU each.

    Example: `medusa bench scale --workers 1,2,4 --parts distill,serve --time-budget 500`
    """
    os.environ.setdefault(NVLS, "0")  # Ray's workers take it over: NVLink multicast stays off unless asked for
    from rich.console import Console
    from rich.markdown import Markdown

    from benchmarks.scaling.bench import ScaleBenchmark
    from benchmarks.scaling.config import PARTS, ScaleConfig
    from benchmarks.scaling.models import inflated

    config = ScaleConfig(
        workers=_numbers(workers, "--workers"),
        parts=tuple(part.strip() for part in parts.split(",") if part.strip()) or PARTS,
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        heads=heads and str(Path(heads).resolve()),
        inflate=inflate,
        prompts=prompts,
        rows=rows,
        max_batch_size=max_batch_size,
        reply_tokens=reply_tokens,
        prompt_tokens=prompt_tokens,
        concurrency=_numbers(concurrency, "--concurrency"),
        batch=batch,
        length=length,
        steps=steps,
        num_heads=num_heads,
        joint_method=joint_method,
        upscale_delay_s=upscale_delay,
        repeats=repeats,
        dtype=dtype,
        device=device,
        kv_cache_gb=kv_cache_gb,
        time_budget=time_budget,
        part_limit=part_limit,
        again=again,
        out=out,
    )
    console = Console()
    cluster = partial(ray_cluster, min_cpus=2 * config.most + 4)  # logical ones: workers, their controllers, proxies
    benchmark = ScaleBenchmark(inflated(config), cluster, lambda text: console.print(text, highlight=False))
    done = benchmark.run()
    console.print(Markdown((out / "scale.md").read_text()))
    console.print(f"figures: {out / 'scale.json'}", highlight=False)
    if any(part.status == "failed" for part in done):
        raise typer.Exit(1)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of numbers from 1 on with commas between", param_hint=option)
    return tuple(sorted(set(map(int, parts))))


if __name__ == "__main__":
    typer.run(scale)
