"""`medusa bench scale`: the parts one after the other, each in a Ray of its own, every point on disk as soon as it is
there.

    <out>/scale.json, scale.md, scale.png    all parts measured so far, each with its machine, settings and state

A part ends by itself before what would not fit its time, and is broken off a little later whatever it waits for. Parts
that stand in <out> as measured, on such a machine with these settings, are kept; so a run that was cut short goes on.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray.exceptions import RayError
from ray.train import TrainingFailedError

from benchmarks.scaling.config import PARTS, ScaleConfig
from benchmarks.scaling.machine import Machine, describe
from benchmarks.scaling.points import CutShort, Deadline, LeftOut, Point, alarm
from benchmarks.scaling.report import Part, told, write_report
from medusa.config import ConfigError

GRACE = 1.15  # of a part's time, until it is broken off; its own stops should come first
MEASURES = {  # loaded when their turn comes, so that a machine needs only the packages of what it measures
    "ray": "benchmarks.scaling.overheads:overheads",
    "distill": "benchmarks.scaling.distilling:distilling",
    "medusa-1": "benchmarks.scaling.training:medusa_1",
    "medusa-2": "benchmarks.scaling.training:medusa_2",
    "serve": "benchmarks.scaling.serving:serving",
    "autoscale": "benchmarks.scaling.serving:autoscale",
    "tensor-parallel": "benchmarks.scaling.tensor_parallel:tensor_parallel",
}
WITHOUT_RAY = {"tensor-parallel"}  # the devices are its own
Cluster = Callable[[], AbstractContextManager[None]]
Say = Callable[[str], None]


@dataclass
class ScaleBenchmark:
    config: ScaleConfig
    cluster: Cluster
    say: Say = field(default=lambda text: None)

    def run(self) -> list[Part]:
        """All parts in <out>, those of earlier runs too. Raises ConfigError for what the machine does not have."""
        ends = time.monotonic() + (self.config.time_budget or math.inf)
        with self.cluster():
            machine = describe(self.config.device)
        config = replace(self.config, device=machine.device)
        _check(config, machine)
        parts = _read(config.out)
        asked = [name for name in PARTS if name in config.parts]
        for number, name in enumerate(asked):
            fresh = Part(name, "cut short", machine, json.loads(json.dumps(config.settings)))
            if not config.again and _is_done(parts.get(name), fresh):
                self.say(f"{name}: kept as measured")
                continue
            seconds = (ends - time.monotonic()) / (len(asked) - number)
            if seconds <= 0:
                parts.setdefault(name, replace(fresh, why="no time was left for it"))
                _write(config.out, parts, plot=False)
                continue
            self._measure(config, fresh, min(seconds, config.part_limit), parts)
        return list(parts.values())

    def _measure(self, config: ScaleConfig, part: Part, seconds: float, parts: dict[str, Part]) -> None:
        self.say(f"{part.name}: {seconds:.0f} s at most")
        started = time.monotonic()
        part = replace(part, started=time.strftime("%Y-%m-%d %H:%M:%S"), why="the run ended here")

        def save(now: Part, *, plot: bool = False) -> None:
            parts[now.name] = replace(now, seconds=round(time.monotonic() - started, 1))
            _write(config.out, parts, plot=plot)

        status, why = "measured", ""
        try:
            with nullcontext() if part.name in WITHOUT_RAY else self.cluster(), alarm(GRACE * seconds):
                for point in _measure_of(part.name)(config, Deadline(seconds)):
                    part = part.with_point(point)
                    self.say(told(point))
                    save(part)
        except LeftOut as reason:
            status, why = "left out", str(reason)
        except CutShort as reason:
            status, why = "cut short", str(reason)
        except ImportError as error:
            status, why = "left out", f"a package is missing here: {error}"
        except (RuntimeError, OSError, RayError, TrainingFailedError) as error:
            status, why = "failed", f"{type(error).__name__}: {str(error)[:500]}"
        self.say(f"{part.name}: {status}{f' ({why})' if why else ''}")
        save(replace(part, status=status, why=why), plot=True)  # type: ignore[arg-type]


def _measure_of(part: str) -> Callable[[ScaleConfig, Deadline], Iterator[Point]]:
    module, _, name = MEASURES[part].partition(":")
    return getattr(importlib.import_module(module), name)


def _check(config: ScaleConfig, machine: Machine) -> None:
    if machine.device == "cuda" and machine.gpus < config.most:
        raise ConfigError(
            f"{config.most} workers take {config.most} GPUs, one each; this cluster has {machine.gpus}: give fewer "
            "with --workers, or --device cpu"
        )


def _is_done(part: Part | None, fresh: Part) -> bool:
    same = part is not None and (part.machine, part.settings) == (fresh.machine, fresh.settings)
    return same and part is not None and part.status in ("measured", "left out")


def _write(out: Path, parts: dict[str, Part], *, plot: bool) -> None:
    write_report(out, [parts[name] for name in PARTS if name in parts], plot=plot)


def _read(out: Path) -> dict[str, Part]:
    file = out / "scale.json"
    if not file.exists():
        return {}
    return {content["name"]: Part.from_dict(content) for content in json.loads(file.read_text())["parts"]}
