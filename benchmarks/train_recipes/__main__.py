"""Which training recipe gives the most tokens a step? One distillation, several recipes, one table.

    python -m benchmarks.train_recipes distil BACKBONE WORK --train chat_train.jsonl.gz --heldout heldout_chat.jsonl \
        --mt-bench mt_bench.jsonl --train-temperatures 0.7,1.0 --budget-s 180
    python -m benchmarks.train_recipes train  BACKBONE WORK --recipes m1-soft:70,hydra-soft-4layers:80,m2-full:110
    python -m benchmarks.train_recipes table  WORK

`distil` adds to WORK/replies.jsonl the backbone's replies to each evaluation set at each temperature, then to the
training prompts, until its budget is spent; what is there already is not asked again. `train` trains each recipe within
its own budget (after the colon, else --budget-s) and skips those that have a result. After each it writes
WORK/results/NAME.json, WORK/heads/NAME (and WORK/models/NAME, where the backbone learned), results.md, results.json and
curves.png.

Tokens a step are exact for lossless decoding (sample, then match): the offline walk over replies that the model itself
gave, cut where they loop. Trees of 64 nodes are grown on rows kept back from training. A recipe that changes the model
answers the evaluation prompts itself, and is compared with the base on the base's replies and on reference replies.
No Ray, no MLflow: torch, transformers, peft, safetensors and matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.train_recipes.distil import distil
from benchmarks.train_recipes.recipes import RECIPES
from benchmarks.train_recipes.run import run_recipes
from benchmarks.train_recipes.table import write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_distil = commands.add_parser("distil", help="the backbone's replies; adds to those that are there")
    of_distil.add_argument("backbone", type=Path)
    of_distil.add_argument("work", type=Path)
    of_distil.add_argument("--train", type=Path, required=True)
    of_distil.add_argument("--heldout", type=Path, required=True)
    of_distil.add_argument("--mt-bench", type=Path)
    of_distil.add_argument("--limit", type=int, help="training prompts (default: all)")
    of_distil.add_argument("--eval-limit", type=int, help="prompts of each evaluation set (default: all)")
    of_distil.add_argument("--temperatures", type=numbers, default=[0.0, 0.7, 1.0], help="of the evaluation sets")
    of_distil.add_argument(
        "--train-temperatures", type=numbers, default=[0.7], help="each training prompt is answered at each, in order"
    )
    of_distil.add_argument("--budget-s", type=float, help="seconds in all, loading included (default: no limit)")
    of_distil.add_argument("--wave", type=int, default=2048, help="prompts between two looks at the clock")
    of_train = commands.add_parser("train", help="recipes, each within its budget")
    of_train.add_argument("backbone", type=Path)
    of_train.add_argument("work", type=Path)
    of_train.add_argument("--recipes", required=True, help=f"NAME or NAME:SECONDS, of {', '.join(RECIPES)}")
    of_train.add_argument("--budget-s", type=float, default=60.0, help="of training, where a recipe names none")
    of_train.add_argument(
        "--total-s",
        type=float,
        help="start no recipe that is expected to end later than this, loading and measuring counted",
    )
    of_train.add_argument("--set", nargs="*", default=[], help="trainer numbers for all recipes, such as lr=2e-3")
    for command in (of_distil, of_train):
        command.add_argument("--max-tokens", type=int, default=256, help="of a reply")
        command.add_argument("--batch-size", type=int, default=256, help="of decoding")
        command.add_argument("--device", default=None)
        command.add_argument("--dtype", default=None)
        command.add_argument("--max-model-len", type=int, default=1024)
    of_table = commands.add_parser("table", help="WORK/results.md from WORK/results/*.json")
    of_table.add_argument("work", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "distil":
        distil(arguments)
    elif arguments.command == "train":
        run_recipes(arguments)
    else:
        print(write_table(arguments.work))


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
