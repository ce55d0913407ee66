"""The heads: they start as the LM head, their state dict is the published layout, guesses are the backbone's ids."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medusa.config import ConfigError, validate
from medusa.heads import HeadsConfig, MedusaHeads

HIDDEN, VOCAB = 16, 40
VOCABULARIES = ["own", "shared", "truncated"]


def config(vocabulary="own", **changes):
    truncated = {"truncated_vocab_size": 8} if vocabulary == "truncated" else {}
    return HeadsConfig(**{"hidden_size": HIDDEN, "vocab_size": VOCAB, "vocabulary": vocabulary, **truncated, **changes})


def token_map_of(heads_config):
    if heads_config.vocabulary != "truncated":
        return None
    generator = torch.Generator().manual_seed(3)
    return torch.randperm(heads_config.vocab_size, generator=generator)[: heads_config.truncated_vocab_size]


def new_heads(heads_config, weight):
    return MedusaHeads.initialised(heads_config, weight, token_map_of(heads_config))


def trained(heads, seed=0):
    """The heads with random weights everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return heads


@pytest.fixture
def weight():
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hidden():
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_new_heads_are_the_lm_head(vocabulary, num_layers, weight, hidden):
    heads = new_heads(config(vocabulary, num_layers=num_layers, num_heads=3), weight)
    rows = heads.token_map if vocabulary == "truncated" else slice(None)
    assert len(heads.logits(hidden, weight)) == 3
    for k, logits in enumerate(heads.logits(hidden, weight)):
        assert torch.equal(heads.features(k, hidden), hidden)
        torch.testing.assert_close(logits, functional.linear(hidden, weight[rows]))


def test_new_heads_take_the_lm_heads_dtype_and_keep_an_integer_map(weight):
    heads = new_heads(config("truncated"), weight.bfloat16())
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}
    assert heads.token_map.dtype == torch.int64


def test_own_matrices_are_copies(weight, hidden):
    heads = new_heads(config("own", num_heads=2), weight)
    before = weight.clone()
    heads[0][-1].weight.data.zero_()
    assert torch.equal(weight, before)
    torch.testing.assert_close(heads.logits(hidden, weight)[1], functional.linear(hidden, weight))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logits_are_the_papers_formula(vocabulary, weight, hidden):
    heads = trained(new_heads(config(vocabulary, num_layers=2, num_heads=3), weight))
    state = heads.state_dict()
    for k, logits in enumerate(heads.logits(hidden, weight)):
        x = hidden
        for layer in range(2):
            z = x @ state[f"{k}.{layer}.linear.weight"].T + state[f"{k}.{layer}.linear.bias"]
            x = x + z * torch.sigmoid(z)
        matrix = weight if vocabulary == "shared" else state[f"{k}.2.weight"]
        torch.testing.assert_close(logits, x @ matrix.T)
        torch.testing.assert_close(heads.features(k, hidden), x)


def test_each_layer_of_each_head_is_a_module_of_its_own(weight):
    heads = new_heads(config(num_layers=3, num_heads=4), weight)
    blocks = {id(block) for head in heads for block in list(head)[:3]}
    matrices = {head[-1].weight.data_ptr() for head in heads}
    assert (len(blocks), len(matrices)) == (12, 4)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_state_dict_has_exactly_the_published_keys(vocabulary, weight):
    state = new_heads(config(vocabulary, num_layers=2, num_heads=2), weight).state_dict()
    expected = {f"{h}.{layer}.linear.{part}": (HIDDEN, HIDDEN)[: 2 if part == "weight" else 1]
                for h in range(2) for layer in range(2) for part in ("weight", "bias")}  # fmt: skip
    if vocabulary != "shared":
        expected |= {f"{h}.2.weight": (8 if vocabulary == "truncated" else VOCAB, HIDDEN) for h in range(2)}
    if vocabulary == "truncated":
        expected["token_map"] = (8,)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_guesses_are_the_best_tokens_of_the_backbones_vocabulary_with_their_logprobs(vocabulary, weight, hidden):
    heads = trained(new_heads(config(vocabulary, num_heads=3), weight))
    ids_BKS, logprobs_BKS = heads.guess(hidden, weight, 4)
    assert ids_BKS.shape == logprobs_BKS.shape == (5, 3, 4)
    for k, logits in enumerate(heads.logits(hidden, weight)):
        for b in range(5):
            own_ids = range(VOCAB) if vocabulary != "truncated" else heads.token_map.tolist()
            logprobs = dict(zip(own_ids, logits[b].log_softmax(-1).tolist(), strict=True))
            best = sorted(logprobs, key=logprobs.get, reverse=True)[:4]
            assert ids_BKS[b, k].tolist() == best
            assert logprobs_BKS[b, k].tolist() == pytest.approx([logprobs[token] for token in best], abs=1e-5)


def test_guesses_see_the_backbones_logit_scale_and_cap(weight, hidden):
    heads = trained(new_heads(config(num_heads=2), weight))

    def cap(logits):
        return 2.0 * torch.tanh(logits / 2.0)

    ids, logprobs = heads.guess(hidden, weight, VOCAB, cap)
    for k, logits in enumerate(heads.logits(hidden, weight)):
        torch.testing.assert_close(logprobs[:, k], cap(logits).log_softmax(-1).gather(-1, ids[:, k]))


def test_guesses_of_a_low_precision_head_are_normalised_in_float32(weight, hidden):
    heads = new_heads(config(), weight.bfloat16())
    _, logprobs = heads.guess(hidden.bfloat16(), weight.bfloat16(), VOCAB)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(5, 4))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_first_heads_can_be_asked_alone(vocabulary, weight, hidden):
    heads = trained(new_heads(config(vocabulary, num_heads=3), weight))
    all_ids, all_logprobs = heads.guess(hidden, weight, 4)
    ids, logprobs = heads.guess(hidden, weight, 4, num_heads=2)
    assert torch.equal(ids, all_ids[:, :2])
    torch.testing.assert_close(logprobs, all_logprobs[:, :2])
    assert len(heads.logits(hidden, weight, 1)) == 1


def test_more_guesses_than_a_head_has_tokens_are_refused(weight, hidden):
    heads = new_heads(config("truncated"), weight)
    with pytest.raises(ValueError, match="9 guesses asked of heads over 8 tokens"):
        heads.guess(hidden, weight, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads of the heads must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers of the heads must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"truncated_vocab_size": 8}, "truncated_vocab_size is 8 with vocabulary 'own'"),
        ({"vocabulary": "truncated"}, "truncated_vocab_size is None with vocabulary 'truncated'"),
        ({"vocabulary": "truncated", "truncated_vocab_size": 0}, "truncated_vocab_size 0 must be 1 to 40"),
        ({"vocabulary": "truncated", "truncated_vocab_size": 41}, "truncated_vocab_size 41 must be 1 to 40"),
    ],
)
def test_impossible_shapes_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        HeadsConfig(**{"hidden_size": HIDDEN, "vocab_size": VOCAB, **changes})


def test_unknown_keys_of_a_stored_shape_are_refused():
    with pytest.raises(ConfigError, match="num_head"):
        validate(HeadsConfig, {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_head": 2}, source="medusa.json")


@pytest.mark.parametrize(
    ("token_map", "message"),
    [
        (None, r"shape \(8,\), got None"),
        (torch.arange(7), r"shape \(8,\), got \(7,\)"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), "more than once"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, VOCAB]), "vocabulary of 40"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, -1]), "vocabulary of 40"),
    ],
)
def test_token_maps_that_do_not_fit_are_refused(token_map, message):
    with pytest.raises(ValueError, match=message):
        MedusaHeads(config("truncated"), token_map)


@pytest.mark.parametrize("vocabulary", ["own", "shared"])
def test_a_token_map_without_a_truncated_vocabulary_is_refused(vocabulary):
    with pytest.raises(ValueError, match=f"not '{vocabulary}'"):
        MedusaHeads(config(vocabulary), torch.arange(8))
