"""Distance from the base: against whole logits; zero for the base itself; numbers read from texts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from medusa.model import Backbone
from medusa.quality import compare, last_number

ROWS = [([1, 5, 6], [7, 8, 9, 10]), ([1, 4], [11, 12]), ([1, 2, 3, 4, 5, 6], [400] * 9), ([1, 2], [])]


@pytest.fixture(scope="module")
def pair(make_backbone_dir):
    return [Backbone.from_pretrained(make_backbone_dir("llama", seed=seed), device="cpu") for seed in (0, 1)]


def test_a_model_is_no_distance_from_itself(pair):
    base, _ = pair
    found = compare(base, base, ROWS)
    assert (found.positions, found.kl, found.agreement) == (4 + 2 + 9, pytest.approx(0, abs=1e-9), 1.0)
    assert found.perplexity_ratio == 1.0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_distances_are_those_of_whole_logits(pair, batch_size):
    base, model = pair
    kl = base_nll = nll = same = positions = 0.0
    for prompt, reply in ROWS[:3]:
        ids = torch.tensor([[*prompt, *reply]])
        log_p, log_q = (b.logits(b.hidden_states(ids))[0, len(prompt) - 1 : -1].log_softmax(-1) for b in (base, model))
        kl += kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        base_nll += cross_entropy(log_p, torch.tensor(reply), reduction="sum").item()
        nll += cross_entropy(log_q, torch.tensor(reply), reduction="sum").item()
        same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        positions += len(reply)
    found = compare(base, model, ROWS, batch_size=batch_size)
    assert found.kl == pytest.approx(kl / positions, rel=1e-5) and found.agreement == same / positions
    assert found.base_perplexity == pytest.approx(math.exp(base_nll / positions), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / positions), rel=1e-5)


def test_nothing_to_compare_on_is_an_error(pair):
    with pytest.raises(ValueError, match="no row has a reply"):
        compare(*pair, [([1, 2], [])])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("She makes 9 * 2 = $18 every day.\n#### 1,234", 1234),
        ("so it costs $3.50.", 3.5),
        ("It is -7 degrees.", -7),
        ("no number here", None),
        ("first 12, then 13.", 13),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number
