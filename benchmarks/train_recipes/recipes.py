"""What is compared: each recipe is a kind of heads, what they learn from, and whether the backbone learns too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from medusa.training.schedule import HeadsLossConfig, JointConfig

TOKENS, SOFT = HeadsLossConfig(kind="tokens"), HeadsLossConfig(kind="soft")
HALF = HeadsLossConfig(kind="soft", tokens_share=0.5)
COLD = HeadsLossConfig(kind="soft", teacher_temperature=0.7)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`epochs` of the trainer's numbers is cut to the budget; the schedule then ends with it. `start` names the recipe
    whose heads this one goes on with, which is then the first of two stages. `references` adds the reference replies
    of the training prompts, so that a changed backbone stays what it was on them too."""

    about: str
    kind: str = "medusa"
    num_heads: int = 4
    num_layers: int = 1
    vocabulary: str = "own"
    trainer: dict[str, Any] = field(default_factory=dict)
    loss: HeadsLossConfig = TOKENS
    joint: JointConfig | None = None
    start: str | None = None
    references: bool = False


# The frozen backbone's hidden states stay on the device: a step costs the heads alone.
M1 = {
    "epochs": 10,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup_ratio": 0.03,
    "weight_decay": 0.01,
    "hidden_cache_gib": 24.0,
    "hidden_cache_on": "device",
}
FEW = M1 | {"epochs": 4, "weight_decay": 0.0}
HYDRA = Recipe(about="Hydra, tokens", kind="hydra", trainer=M1)
# A small backbone's step is launches, not arithmetic: more rows in each. Its rate is a quarter of the heads'.
M2 = M1 | {"batch_size": 128, "epochs": 20}
FULL = Recipe(
    about="Medusa-2, all weights, soft targets, lambda 0.1",
    num_layers=4,
    trainer=M2,
    loss=SOFT,
    joint=JointConfig(method="full", rank=1, heads_weight=0.1),
    start="m1-soft-4layers",
    references=True,
)
GENTLE = replace(
    FULL,
    about="Medusa-2, all weights at a 16th of the heads' rate, soft targets, lambda 0.1",
    joint=JointConfig(method="full", rank=1, heads_weight=0.1, heads_lr_scale=16.0),
)
LORA = replace(
    FULL,
    about="Medusa-2, LoRA r64, soft targets, lambda 0.2",
    joint=JointConfig(rank=64, alpha=64.0, dropout=0.0, heads_weight=0.2),
)


def weighing(recipe: Recipe, about: str, heads_weight: float, **changes: Any) -> Recipe:
    assert recipe.joint is not None
    return replace(recipe, about=about, joint=replace(recipe.joint, heads_weight=heads_weight), **changes)


RECIPES = {
    "m1-paper": Recipe(about="Medusa-1, tokens, at most 4 epochs, no decay", trainer=FEW),
    "m1-long": Recipe(about="Medusa-1, tokens", trainer=M1),
    "m1-decay": Recipe(about="Medusa-1, tokens, weight decay 0.1", trainer=M1 | {"weight_decay": 0.1}),
    "m1-shared": Recipe(about="Medusa-1, shared LM head, 4 layers", vocabulary="shared", num_layers=4, trainer=M1),
    "m1-4layers": Recipe(about="Medusa-1, tokens, 4 layers", num_layers=4, trainer=M1),
    "m1-soft": Recipe(about="Medusa-1, soft targets", trainer=M1, loss=SOFT),
    "m1-soft-fast": Recipe(about="Medusa-1, soft targets, rate 2e-3", trainer=M1 | {"lr": 2e-3}, loss=SOFT),
    "m1-soft-cold": Recipe(about="Medusa-1, soft targets at T 0.7", trainer=M1, loss=COLD),
    "m1-soft-half": Recipe(about="Medusa-1, soft targets and tokens", trainer=M1, loss=HALF),
    "m1-soft-4layers": Recipe(about="Medusa-1, soft targets, 4 layers", num_layers=4, trainer=M1, loss=SOFT),
    "hydra": HYDRA,
    "hydra-soft": replace(HYDRA, about="Hydra, soft targets", loss=SOFT),
    "hydra-soft-2layers": replace(HYDRA, about="Hydra, soft targets, 2 layers", loss=SOFT, num_layers=2),
    "hydra-soft-4layers": replace(HYDRA, about="Hydra, soft targets, 4 layers", loss=SOFT, num_layers=4),
    "m2-full": FULL,
    "m2-full-low": weighing(FULL, "Medusa-2, all weights, soft targets, lambda 0.03", 0.03),
    "m2-full-high": weighing(FULL, "Medusa-2, all weights, soft targets, lambda 0.3", 0.3),
    "m2-full-gentle": GENTLE,
    "m2-lora": LORA,
    "m2-lora-low": weighing(LORA, "Medusa-2, LoRA r64, soft targets, lambda 0.05", 0.05),
    "m2-hydra": replace(
        FULL, about="Hydra, all weights, soft targets, lambda 0.1", kind="hydra", start="hydra-soft-4layers"
    ),
    "m2-hydra-gentle": replace(
        GENTLE,
        about="Hydra, all weights at a 16th of the heads' rate, soft targets, lambda 0.1",
        kind="hydra",
        start="hydra-soft-4layers",
    ),
    "m2-paper": Recipe(
        about="Medusa-2 as in the paper: LoRA r32, tokens, lambda 0.2, on heads of m1-paper",
        trainer=M2,
        joint=JointConfig(),
        start="m1-paper",
    ),
}
