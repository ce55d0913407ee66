"""The backbone: any supported family's tree nodes give the plain model's logits; the others are refused by name."""

from __future__ import annotations

import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medusa.kernels.tree_attention import PagedTree
from medusa.model import Backbone, UnsupportedModelError, check_supported
from medusa.tree import TokenTree
from medusa.weights import model_directory, weights_digest

PAGE_SIZE = 8
WINDOW = 6  # shorter than every context below
HYBRID = {"layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_theta": 10_000.0}
CASES = {
    "llama": ("llama", {}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-attention-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": ROPE
            | {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-rope-yarn": (
        "llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "mistral": ("mistral", {}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-hybrid": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma-multi-query": ("gemma", {"num_key_value_heads": 1}),
    "gemma2-softcap-hybrid": ("gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 1.5} | HYBRID),
    "gemma3-hybrid": ("gemma3_text", {"sliding_window": WINDOW} | HYBRID),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {}),
    "mixtral-sliding": ("mixtral", {"sliding_window": WINDOW}),
    "granite": ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.7}),
    "cohere": ("cohere", {}),
    "cohere2-hybrid": ("cohere2", {"sliding_window": WINDOW} | HYBRID),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 48}),
}
SLIDING = [name for name, (_, changes) in CASES.items() if "sliding_window" in changes]


def random_tree(rng, num_nodes, heads=5, width=6):
    paths = [()]
    while len(paths) < num_nodes:
        child = (*rng.choice([path for path in paths if len(path) < heads]), rng.randrange(width))
        if child not in paths:
            paths.append(child)
    return TokenTree.from_paths(paths)


def padded(rows, value=0):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def paged(cache, tables, lengths, trees):
    """One step's PagedTree for (depth, ancestors) pairs of different sizes."""
    depth_BN = padded([depth for depth, _ in trees])
    num_nodes = depth_BN.shape[1]
    ancestors_BNN = torch.eye(num_nodes, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, (depth, ancestors) in zip(ancestors_BNN, trees, strict=True):
        row[: len(depth), : len(depth)] = ancestors
    valid_BN = padded([torch.ones_like(depth, dtype=torch.bool) for depth, _ in trees])
    return PagedTree(cache, tables, torch.tensor(lengths), depth_BN, valid_BN, ancestors_BNN)


def chain(length):
    return torch.arange(length), torch.ones(length, length).tril().bool()


def tree_logits(backbone, contexts, trees, drafts, position=lambda tree: tree.depth):
    """[V] logits of every node of every sequence: contexts written as chains, then the trees, in ragged batches.

    Pages are shuffled over a cache full of numbers that must not matter.
    """
    generator = torch.Generator().manual_seed(5)
    lengths = [len(context) for context in contexts]
    num_pages = (max(lengths) + max(tree.num_nodes for tree in trees)) // PAGE_SIZE + 1
    shuffled = 1 + torch.randperm(num_pages * len(contexts), generator=generator)
    shape = (backbone.num_layers, 2, len(shuffled) + 1, PAGE_SIZE, *backbone.kv_shape)
    cache, tables = torch.randn(shape, generator=generator) * 5, shuffled.view(len(contexts), num_pages)
    prompts = [torch.tensor(context) for context in contexts]
    prefill = paged(cache, tables, [0] * len(contexts), [chain(length) for length in lengths])
    prefilled = backbone.logits(backbone.tree_hidden_states(padded(prompts), prefill.depth_BN, prefill))
    step = paged(cache, tables, lengths, [(torch.tensor(tree.depth), tree.ancestors) for tree in trees])
    position_BN = torch.tensor(lengths)[:, None] + padded([torch.tensor(position(tree)) for tree in trees])
    hidden = backbone.tree_hidden_states(padded([torch.tensor(ids) for ids in drafts]), position_BN, step)
    nodes = [row[: tree.num_nodes] for row, tree in zip(backbone.logits(hidden), trees, strict=True)]
    return [row[:length] for row, length in zip(prefilled, lengths, strict=True)], nodes


@torch.no_grad()
def path_logits(model, context, tree, drafts):
    """The plain model's logits after the context and each node's path; and along the context itself."""
    leaves = [node for node in range(tree.num_nodes) if node not in tree.parent]
    texts = [context + [drafts[i] for i in tree.ancestors[leaf].nonzero().flatten().tolist()] for leaf in leaves]
    logits = model(input_ids=padded([torch.tensor(text) for text in texts]), use_cache=False).logits
    nodes = [
        next(logits[i, len(context) + tree.depth[node]] for i, leaf in enumerate(leaves) if tree.ancestors[leaf, node])
        for node in range(tree.num_nodes)
    ]
    return logits[0, : len(context)], torch.stack(nodes)


def ragged_batch(vocab_size, seed=0):
    rng = random.Random(seed)
    trees = [random_tree(rng, size) for size in (2, 17, 64, 5)]
    contexts = [[rng.randrange(vocab_size) for _ in range(length)] for length in (31, 8, 17, 16)]
    drafts = [[rng.randrange(vocab_size) for _ in range(tree.num_nodes)] for tree in trees]
    return contexts, trees, drafts


def eager(folder, **changes):
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", CASES)
def test_every_node_of_a_ragged_batch_of_trees_has_the_plain_models_logits(name, make_backbone_dir):
    family, changes = CASES[name]
    folder = make_backbone_dir(family, **changes)
    backbone, plain = Backbone.from_pretrained(folder, device="cpu"), eager(folder)
    contexts, trees, drafts = ragged_batch(backbone.vocab_size)
    along_contexts, at_nodes = tree_logits(backbone, contexts, trees, drafts)
    for b, tree in enumerate(trees):
        context_logits, node_logits = path_logits(plain, contexts[b], tree, drafts[b])
        torch.testing.assert_close(along_contexts[b], context_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(at_nodes[b], node_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SLIDING)
def test_the_sliding_windows_above_do_matter(name, make_backbone_dir):
    family, changes = CASES[name]
    folder = make_backbone_dir(family, **changes)
    context = torch.tensor([ragged_batch(512)[0][0]])
    with torch.no_grad():
        narrow = eager(folder)(input_ids=context).logits
        wide = eager(folder, sliding_window=256)(input_ids=context).logits
    torch.testing.assert_close(narrow[:, :WINDOW], wide[:, :WINDOW])
    assert (narrow[:, -1] - wide[:, -1]).abs().max() > 1e-3


def test_positions_by_node_instead_of_depth_would_be_noticed(tiny_llama):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    contexts, trees, drafts = ragged_batch(backbone.vocab_size)
    _, right = tree_logits(backbone, contexts, trees, drafts)
    _, wrong = tree_logits(backbone, contexts, trees, drafts, position=lambda tree: range(tree.num_nodes))
    assert (right[2] - wrong[2]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["llama", "gemma2-softcap-hybrid", "mistral-sliding", "cohere", "granite", "opt", "gpt2"]
)
def test_plain_forward_is_the_models_own_and_right_padding_changes_nothing(name, make_backbone_dir):
    family, changes = CASES[name]
    folder = make_backbone_dir(family, **changes)
    backbone, plain = Backbone.from_pretrained(folder, device="cpu"), eager(folder)
    rows = [torch.tensor(context) for context in ragged_batch(backbone.vocab_size)[0]]
    hidden = backbone.hidden_states(padded(rows))
    assert hidden.shape == (4, 31, backbone.hidden_size)
    for b, row in enumerate(rows):
        with torch.no_grad():
            expected = plain(input_ids=row[None]).logits[0]
        torch.testing.assert_close(backbone.logits(hidden[b, : len(row)]), expected, atol=1e-5, rtol=1e-5)


def test_plain_forward_after_a_tree_forward_is_plain_again(tiny_llama):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    contexts, trees, drafts = ragged_batch(backbone.vocab_size)
    before = backbone.hidden_states(torch.tensor([contexts[0]]))
    tree_logits(backbone, contexts, trees, drafts)
    assert torch.equal(backbone.hidden_states(torch.tensor([contexts[0]])), before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2-softcap-hybrid", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 2.0}),
        ("llama", {}),
    ],
)
def test_cap_is_the_models_logit_scale_and_softcap(name, settings, make_backbone_dir):
    family, changes = CASES[name]
    backbone = Backbone.from_pretrained(make_backbone_dir(family, **changes), device="cpu")
    for key, value in settings.items():
        assert getattr(backbone.config, key) == value
    hidden = torch.randn(3, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    raw = hidden @ backbone.lm_head_weight.T
    expected = raw
    if name.startswith("gemma2"):
        expected = 5.0 * torch.tanh(raw / 5.0)
    elif settings:
        expected = raw * 0.5
    torch.testing.assert_close(backbone.cap(raw), expected)
    torch.testing.assert_close(backbone.logits(hidden), expected)


def test_sizes_are_those_of_the_model(make_backbone_dir):
    backbone = Backbone.from_pretrained(make_backbone_dir("llama", head_dim=32), device="cpu")
    assert (backbone.hidden_size, backbone.vocab_size, backbone.num_layers) == (64, 512, 2)
    assert (backbone.kv_shape, backbone.max_positions) == ((2, 32), 512)
    assert (backbone.dtype, backbone.device.type) == (torch.float32, "cpu")
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training


def test_dtype_on_a_cpu_is_float32_unless_asked(make_backbone_dir, tmp_path):
    folder = make_backbone_dir("llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert Backbone.from_pretrained(tmp_path, device="cpu").dtype == torch.float32
    assert Backbone.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_digest_is_of_the_weights_alone(make_backbone_dir, tmp_path):
    one, other = make_backbone_dir("llama"), make_backbone_dir("llama", seed=1)
    backbone = Backbone.from_pretrained(one, device="cpu")
    assert backbone.digest == weights_digest(one)
    assert backbone.digest.startswith("sha256:")
    assert backbone.digest != Backbone.from_pretrained(other, device="cpu").digest
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(tmp_path)  # without the tokenizer
    assert weights_digest(tmp_path) == backbone.digest


def test_digest_of_a_model_in_memory_is_of_its_tensors(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    digest = Backbone(model, name="in memory").digest
    assert digest == Backbone(AutoModelForCausalLM.from_pretrained(tiny_llama), name="again").digest
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert digest != Backbone(model, name="changed").digest
    assert Backbone(model, name="named", digest="sha256:abc").digest == "sha256:abc"


def test_folders_without_a_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        model_directory(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        weights_digest(tmp_path)


REFUSED = [
    ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "llama has RoPE of type 'dynamic'"),
    (
        "phi3",
        {
            "rope_parameters": ROPE
            | {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
            "hidden_size": 64,
            "num_attention_heads": 4,
            "pad_token_id": 0,
        },
        "phi3 has RoPE of type 'longrope'",
    ),
    ("t5", {}, "t5 is an encoder-decoder"),
    ("bart", {}, "bart is an encoder-decoder"),
    ("llama4_text", {}, "llama4_text has layers of type .*chunked_attention"),
    ("deepseek_v3", {}, "deepseek_v3 has kv_lora_rank"),
    ("mamba", {}, "mamba has"),
    ("mamba2", {}, "mamba2 has"),
    ("falcon_mamba", {}, "falcon_mamba has"),
    ("jamba", {}, "jamba has layers of type"),
    ("recurrent_gemma", {}, "recurrent_gemma keeps a recurrent state"),
    ("gemma3n_text", {}, "gemma3n_text has num_kv_shared_layers"),
    ("gemma3", {}, "gemma3 is multimodal"),
    ("gpt_oss", {}, "gpt_oss .* attends in a way of its own"),
    ("bloom", {}, "bloom .* attends in a way of its own"),
    ("vit", {}, "vit has no causal language model"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_kinds_that_would_decode_wrongly_are_refused_by_name(kind, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        check_supported(AutoConfig.for_model(kind, **changes))


def test_an_unsupported_folder_is_refused_before_its_weights_are_read(make_backbone_dir, tmp_path):
    rope = ROPE | {"rope_type": "dynamic", "factor": 2.0}
    config = AutoConfig.from_pretrained(make_backbone_dir("llama"))
    config.rope_parameters = rope
    config.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        Backbone.from_pretrained(tmp_path, device="cpu")


TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
}


NO_TINY_MODEL = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
)


def tiny_model(kind):
    """A random model of any kind, as small as its configuration can be made; skips where that is not small."""
    try:
        default = AutoConfig.for_model(kind)
    except NO_TINY_MODEL as error:
        pytest.skip(f"{kind} has no default configuration: {error}")
    check_supported(default)
    changes = {name: value for name, value in TINY.items() if hasattr(default, name)}
    if getattr(default, "sliding_window", None):
        changes["sliding_window"] = WINDOW
    try:
        config = AutoConfig.for_model(kind, **changes)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        assert size < 3e7
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except NO_TINY_MODEL as error:
        pytest.skip(f"cannot make a tiny {kind}: {error}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "bert is not causal"),
        ("diffllama", r"diffllama attends in layers \[0, 0, 1, 1\]"),
        ("hrm_text", r"hrm_text attends in layers .* needs each of 16 layers once"),
        ("doge", "doge attends with .'attention_mask'."),
        ("nemotron", "nemotron does not hand keyword arguments down"),
        ("modernbert-decoder", "modernbert-decoder changes hidden states or logits"),
    ],
)
def test_kinds_whose_forward_does_not_fit_are_refused_by_name_when_built(kind, message):
    with pytest.raises(UnsupportedModelError, match=message):
        Backbone(tiny_model(kind), name=kind)


def test_keys_and_values_of_different_sizes_are_refused_by_name(monkeypatch):
    sizes = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    usual = {name: value for name, value in TINY.items() if name != "head_dim"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **usual, **sizes))
    monkeypatch.setattr("medusa.model.check_supported", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"deepseek_v3 attends .* \[\(4, 4, 32, 8\)\]"):
        Backbone(model, name="latent attention")


def test_a_decoder_set_up_to_look_ahead_is_refused_by_name(make_backbone_dir):
    with pytest.raises(UnsupportedModelError, match="gemma3_text is not causal"):
        Backbone.from_pretrained(make_backbone_dir("gemma3_text", use_bidirectional_attention=True), device="cpu")


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "indices"])
def test_attention_with_more_than_a_tree_covers_is_refused_by_name(tiny_llama, name):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    ids = torch.arange(2)[None]
    with pytest.raises(UnsupportedModelError, match=f"llama attends with .'{name}'."):
        backbone._use("medusa_tree")
        backbone.model(input_ids=ids, use_cache=False, tree=object(), **{name: ids})


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"xmod"}))  # it wants a language
def test_every_causal_model_of_transformers_is_right_or_refused(kind):
    try:
        backbone = Backbone(tiny_model(kind), name=kind)
    except UnsupportedModelError as refusal:
        assert kind in str(refusal)
        return
    contexts, trees, drafts = ragged_batch(backbone.vocab_size)
    _, at_nodes = tree_logits(backbone, contexts, trees, drafts)
    backbone._use("sdpa")
    for b, tree in enumerate(trees):
        _, node_logits = path_logits(backbone.model, contexts[b], tree, drafts[b])
        torch.testing.assert_close(at_nodes[b], node_logits, atol=3e-5, rtol=1e-4)
