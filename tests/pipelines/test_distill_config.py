"""The configuration of the distil step: what is refused, and what makes other rows of it."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.distill_config import DistillConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rows_per_block": 0}, "rows_per_block must be at least 1"),
        ({"num_actors": -1}, "num_actors must be 0 "),
        ({"max_failed": 2}, "max_failed is a fraction"),
        ({"temperature": -1}, "temperature"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1"),
        ({"tensor_parallel": 2, "gpus_per_actor": 1.0}, "needs as many gpus_per_actor, got 1"),
        ({"tensor_parallel": 2, "quantization": "int8", "quantized_teacher": True}, "do not go together"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**config)


def test_a_quantised_teacher_must_be_asked_for():
    with pytest.raises(ValueError, match="quantized_teacher=true"):
        DistillConfig(quantization="int8")
    asked = DistillConfig(quantization="int8", quantized_teacher=True)
    assert asked.meaning["quantization"] == "int8"  # other rows, so another step
    assert "quantization" not in DistillConfig().meaning
