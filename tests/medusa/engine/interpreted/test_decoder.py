"""Both decoders of a GPU step, interpreted: the hidden states of transformers' own forward, and each other's."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medusa.engine import decoder as decoder_module
from medusa.engine import layers
from medusa.engine.decoder import FusedDecoder, ModuleDecoder, StepNodes, can_fuse, fuse
from medusa.kernels import matmul, tiles
from medusa.kernels.attention_plan import AttentionPlan, Scratch, Visible
from medusa.kernels.state import Drafts
from medusa.kernels.tiles import RingTiles
from medusa.model import Backbone
from medusa.quantized_linear import quantize_linears

CPU = torch.device("cpu")
PAGE_SIZE, PAGES, ROWS, PADDING, VOCAB = 16, 4, 4, 3, 97
KINDS = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("mistral", {"sliding_window": 6}),
]


def backbone_of(kind, **changes):
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **changes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # biases and norms too, which start as zeros and ones
            parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    return Backbone(model, name=kind, digest="none")


class Pages:
    """A cache that holds NaN wherever nothing has been written, and the lengths of its rows."""

    def __init__(self, backbone):
        self.data = torch.full((2, 2, ROWS * PAGES + 1, PAGE_SIZE, *backbone.kv_shape), float("nan"))
        self.tables = torch.arange(1, ROWS * PAGES + 1, dtype=torch.int32).view(ROWS, PAGES)
        self.tables[-1] = 0
        self.length = torch.zeros(ROWS, dtype=torch.int64)

    def step(self, decoder, rows, texts, bits_RNW=None, depth_RN=None):
        """Runs the texts as nodes of the rows, behind what these hold; padding follows. [M, d]."""
        counts = [len(text) for text in texts]
        total = sum(counts) + PADDING
        token, position = torch.zeros(2, total, dtype=torch.int64)
        row, node = torch.full((total,), ROWS - 1, dtype=torch.int32), torch.zeros(total, dtype=torch.int32)
        m = 0
        for its_row, text in zip(rows, texts, strict=True):
            for n, token_id in enumerate(text):
                depth = n if depth_RN is None else int(depth_RN[its_row, n])
                row[m], node[m], token[m], position[m] = its_row, n, token_id, int(self.length[its_row]) + depth
                m += 1
        count = torch.tensor(counts, dtype=torch.int32)
        visible = Visible(
            torch.tensor(rows, dtype=torch.int32), (count.cumsum(0) - count).int(), count, self.length, self.tables,
            bits_RNW, depth_RN,
        )  # fmt: skip
        plan = AttentionPlan(splits=2, rows=16, columns=16, max_nodes=max(counts), warps=1)
        return decoder(StepNodes(token, position, row, node, visible, plan)).clone().split([*counts, PADDING])[:-1]


def decoders(backbone):
    scratch = Scratch.of(heads=4, size=backbone.kv_shape[1], processors=16, device=CPU)
    for kind in (ModuleDecoder, FusedDecoder):
        pages = Pages(backbone)
        arguments = (backbone, pages.data, scratch)
        yield pages, kind(*arguments) if kind is ModuleDecoder else kind(*arguments, 128)


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=[f"{kind}{len(changes)}" for kind, changes in KINDS])
def test_chunks_and_a_tree_give_what_a_plain_forward_gives(kind, changes):
    backbone, rng = backbone_of(kind, **changes), random.Random(0)
    assert can_fuse(backbone)
    texts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (14, 6)]
    rows, first = [2, 0], [9, 4]
    # A root with two children, the second of which has a child: the text goes along nodes 0, 2 and 3.
    parents, depths = [-1, 0, 0, 2], [0, 1, 1, 2]
    depth_RN, bits_RNW = torch.zeros(ROWS, 64, dtype=torch.int32), torch.zeros(ROWS, 64, 1, dtype=torch.int64)
    for node, parent in enumerate(parents):
        depth_RN[:, node] = depths[node]
        bits_RNW[:, node] = 1 << node | (bits_RNW[0, parent] if parent >= 0 else 0)
    whole = [backbone.hidden_states(torch.tensor([text]))[0] for text in texts]
    wrong = [rng.randrange(VOCAB) for _ in texts]
    branch = [
        backbone.hidden_states(torch.tensor([[*text[: start + 1], token]]))[0, -1]
        for text, start, token in zip(texts, first, wrong, strict=True)
    ]
    with torch.inference_mode():
        for pages, decoder in decoders(backbone):
            chunks = pages.step(decoder, rows, [text[:start] for text, start in zip(texts, first, strict=True)])
            for b, start in enumerate(first):
                torch.testing.assert_close(chunks[b], whole[b][:start], atol=2e-5, rtol=1e-4)
                pages.length[rows[b]] = start
            nodes = [
                [text[start], token, *text[start + 1 : start + 3]][: 4 if b == 0 else 3]
                for b, (text, start, token) in enumerate(zip(texts, first, wrong, strict=True))
            ]
            found = pages.step(decoder, rows, nodes, bits_RNW, depth_RN)
            for b, start in enumerate(first):
                torch.testing.assert_close(found[b][1], branch[b], atol=2e-5, rtol=1e-4)
                on_path = found[b][[0, 2, 3] if b == 0 else [0, 2]]
                expected = whole[b][start : start + len(on_path)]
                torch.testing.assert_close(on_path, expected, atol=2e-5, rtol=1e-4)


def test_models_of_other_forwards_are_not_fused():
    assert not can_fuse(backbone_of("llama", mlp_bias=True))
    assert not can_fuse(backbone_of("llama", hidden_act="gelu"))
    assert not can_fuse(backbone_of("phi3", pad_token_id=0))


def test_fusing_leaves_the_model_as_it_was():
    """Its parameters become views of the joined matrices, with the values that they had."""
    backbone = backbone_of("qwen2")
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    list(decoders(backbone))
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    attention = backbone.model.base_model.layers[0].self_attn
    start = attention.q_proj.weight.untyped_storage().data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == start


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_model_that_was_fused_before_is_not_copied_again(quantization):
    """As when heads of another shape come: memory that the cache has left is not enough for two."""
    backbone = backbone_of("qwen2")
    layer = backbone.model.base_model.layers[0]
    if quantization:
        quantize_linears(backbone.model.base_model, quantization, CPU)
    first, second = fuse(layer), fuse(layer)
    for name in ("qkv", "gate_up"):
        before, after = getattr(first, name), getattr(second, name)
        pairs = [(before.values, after.values), (before.scale, after.scale)] if quantization else [(before, after)]
        for one, other in pairs:
            assert one.data_ptr() == other.data_ptr()
            assert torch.equal(one, other)
    assert first.qkv_bias.data_ptr() == second.qkv_bias.data_ptr()


class Planned(Exception):
    pass


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=[f"{kind}{len(changes)}" for kind, changes in KINDS])
@pytest.mark.parametrize("has_ring", [True, False])
def test_layers_plan_for_a_ring_where_it_knows_all_that_is_asked(kind, changes, has_ring, monkeypatch):
    """Not windows, nor heads that are normalised before."""

    def planned(**how):
        raise Planned(how["ring"])

    monkeypatch.setattr(layers, "has_ring", lambda _: has_ring)
    monkeypatch.setattr(layers.AttentionPlan, "of", planned)
    backbone = backbone_of(kind, **changes)
    pages = Pages(backbone)
    count = torch.ones(1, dtype=torch.int32)
    visible = Visible(count, count, count, pages.length, pages.tables, None, None)
    with pytest.raises(Planned, match=str(has_ring and kind in ("llama", "qwen2"))):
        layers.Layers(backbone, pages.data, 128)(Drafts.empty(1, 1, CPU), visible, 1)


class LoneRank:
    """One of a group of processes, of which there are no others."""

    def sum(self, partial_1Md):
        pass


def ring_of(x):
    """A product of x by a ring, which finds all the rows that it reads."""
    held = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    assert held >= tiles.rows_read(len(x)) * x.stride(0) * x.element_size()
    return "ring"


@pytest.fixture
def launches(monkeypatch):
    """What is launched of a decoder's norms, products and attention, with plans as on a Hopper GPU. Nothing is run."""
    launched = []
    monkeypatch.setattr(tiles, "has_warpgroups", lambda _: True)
    monkeypatch.setattr(tiles, "has_compiler", lambda: True)
    monkeypatch.setattr(tiles, "_processors", lambda _: 2)
    for ring in ("ring_product", "ring_bytes"):
        monkeypatch.setattr(matmul, ring, lambda x, *_, **__: launched.append(ring_of(x)))
    monkeypatch.setattr(matmul, "matmul", lambda *_, **__: launched.append("triton"))
    monkeypatch.setattr(decoder_module, "add_norm", lambda *_, **how: launched.append(how))
    monkeypatch.setattr(decoder_module, "attend", lambda *_, **__: launched.append("attention"))
    monkeypatch.setattr(decoder_module, "silu_mul", lambda *_, **__: launched.append("gate"))
    monkeypatch.setattr(
        decoder_module,
        "gated",
        lambda x, weight, out, cut, **_: launched.append(ring_of(x) if isinstance(cut, RingTiles) else "triton"),
    )
    return launched


def early_norms(launches, num_nodes, *, rank=None, pdl=True, quantization=None):
    """Whether each of the norms of a step lets the next kernel start before it waits."""
    backbone = backbone_of("llama")
    backbone.model.to(torch.bfloat16)
    if quantization:
        quantize_linears(backbone.model.base_model, quantization, CPU)
    backbone.rank = rank
    pages = Pages(backbone)
    decoder = FusedDecoder(backbone, pages.data.bfloat16(), Scratch.of(heads=4, size=16, processors=2, device=CPU), 128)
    decoder.pdl = pdl
    pages.step(decoder, [0], [[1] * (num_nodes - PADDING)], torch.zeros(ROWS, 128, 2, dtype=torch.int64))
    norms = [place for place, launch in enumerate(launches) if isinstance(launch, dict)]
    early = [launches[place].get("early", False) for place in norms]
    for place, is_early in zip(norms, early, strict=True):
        assert not is_early or (launches[place]["pdl"] and launches[place + 1] == "ring")
    return early


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
@pytest.mark.parametrize("num_nodes", [4, 33, 64])
def test_norms_before_rings_of_few_rows_are_early(num_nodes, quantization, launches):
    """Not a step's first, which waits for torch's own launch, nor its last: the decoder launches nothing behind it."""
    found = early_norms(launches, num_nodes, quantization=quantization)
    assert found == [False, True, True, True, False] and "triton" not in launches


def test_norms_before_other_products_are_not_early(launches, monkeypatch):
    monkeypatch.setattr(tiles, "_processors", lambda _: 6)  # of whom each would have too few rows of QKV for a ring
    assert early_norms(launches, 64) == [False, True, False, True, False]


@pytest.mark.parametrize("num_nodes", [65, 128])
def test_norms_before_rings_of_more_rows_are_not_early(num_nodes, launches):
    assert not any(early_norms(launches, num_nodes))
    assert "ring" in launches


def test_nor_any_behind_sums_over_processes(launches):
    assert not any(early_norms(launches, 64, rank=LoneRank()))
    assert "ring" in launches


def test_nor_any_without_a_compiler_or_dependent_launch(launches, monkeypatch):
    assert not any(early_norms(launches, 64, pdl=False))
    monkeypatch.setattr(tiles, "has_compiler", lambda: False)
    launches.clear()
    assert not any(early_norms(launches, 64)) and "ring" not in launches
