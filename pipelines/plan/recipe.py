"""A pipeline's config as what `medusa plan train` counts."""

from __future__ import annotations

from pipelines.plan.shapes import ModelShape
from pipelines.plan.training import Recipe
from pipelines.run import PipelineConfig

WEIGHT_BITS = {None: 16, "8bit": 8, "4bit": 4}


def recipe_of(config: PipelineConfig, shape: ModelShape) -> Recipe:
    trainer = config.train.trainer
    joint = trainer.joint
    return Recipe(
        weight_bits=WEIGHT_BITS[config.train.quantization],
        sharding=config.train.sharding,
        heads=config.train.heads.on(shape.hidden_size, shape.vocab_size),
        kind=config.train.heads.kind,
        loss=trainer.heads_loss.kind,
        method="heads" if joint is None else joint.method,
        rank=0 if joint is None else joint.rank,
        distils=joint is not None and joint.lm_loss == "distill",
        heads_only_ratio=0.0 if joint is None else joint.heads_only_ratio,
        optimizer=trainer.optimizer,
        checkpointing=trainer.activation_checkpointing,
        epochs=trainer.epochs,
        max_length=trainer.max_length,
        micro_batch=trainer.micro_batch_size or trainer.batch_size,
        chunk_size=trainer.chunk_size,
        distill_batch=config.distill.max_batch_size,
    )
