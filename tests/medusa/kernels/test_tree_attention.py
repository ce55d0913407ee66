"""Tree attention over pages: equal to attention computed node by node over the tokens a node may see."""

from __future__ import annotations

import math
import random

import pytest
import torch

from medusa.kernels.tree_attention import PagedTree
from medusa.tree import TokenTree

LAYERS, PAGE_SIZE, SIZE = 2, 4, 8
TREES = [
    TokenTree.root(),
    TokenTree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0)]),
    TokenTree.from_paths([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]),
    TokenTree.from_paths([(i,) for i in range(15)]),
]
LENGTHS = [9, 0, 4, 13]  # committed tokens: none, whole pages, and pages begun


class Setup:
    """One step's inputs for four sequences on shuffled pages, and every number that it must not read."""

    def __init__(self, heads, kv_heads, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.num_nodes = max(tree.num_nodes for tree in TREES)
        pages = (max(LENGTHS) + self.num_nodes - 1) // PAGE_SIZE + 1
        self.tables = 1 + torch.randperm(len(TREES) * pages + 3, generator=rng)[: len(TREES) * pages].view(-1, pages)
        num_pages = len(TREES) * pages + 4
        self.cache = torch.randn(LAYERS, 2, num_pages, PAGE_SIZE, kv_heads, SIZE, generator=rng)
        self.query = torch.randn(len(TREES), heads, self.num_nodes, SIZE, generator=rng)
        self.key, self.value = torch.randn(2, len(TREES), kv_heads, self.num_nodes, SIZE, generator=rng)

    def step(self):
        def rows(values, fill):
            return torch.tensor([[*v, *[fill] * (self.num_nodes - len(v))] for v in values])

        ancestors = torch.eye(self.num_nodes, dtype=torch.bool).repeat(len(TREES), 1, 1)
        for row, tree in zip(ancestors, TREES, strict=True):
            row[: tree.num_nodes, : tree.num_nodes] = tree.ancestors
        return PagedTree(
            cache=self.cache,
            tables_BP=self.tables,
            length_B=torch.tensor(LENGTHS),
            depth_BN=rows([tree.depth for tree in TREES], 0),
            valid_BN=rows([[True] * tree.num_nodes for tree in TREES], False),
            ancestors_BNN=ancestors,
        )

    def attend(self, layer=1, scaling=0.3, sliding_window=None, softcap=None):
        step = self.step()
        return step.attend(layer, self.query, self.key, self.value, scaling, sliding_window, softcap)

    def slot(self, b, position):
        """(page, offset) of a sequence's position."""
        return int(self.tables[b, position // PAGE_SIZE]), position % PAGE_SIZE


def attend_slowly(setup, b, node, layer, scaling, sliding_window, softcap):
    """[H, D] of one node: softmax over (position, key, value) of what it may see, in Python."""
    tree, length = TREES[b], LENGTHS[b]
    own_position = length + tree.depth[node]
    seen = [(t, *(setup.cache[layer, i][setup.slot(b, t)] for i in (0, 1))) for t in range(length)]
    for other in tree.ancestors[node].nonzero().flatten().tolist():
        seen.append((length + tree.depth[other], setup.key[b, :, other], setup.value[b, :, other]))
    if sliding_window is not None:
        seen = [item for item in seen if own_position - item[0] < sliding_window]
    heads, kv_heads = setup.query.shape[1], setup.key.shape[1]
    out = torch.zeros(heads, SIZE)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = [float(setup.query[b, head, node] @ key[shared]) * scaling for _, key, _ in seen]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        weights = torch.tensor(scores).softmax(0)
        out[head] = sum(weight * value[shared] for weight, (_, _, value) in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_each_node_attends_to_committed_tokens_and_ancestors(heads, kv_heads, sliding_window, softcap):
    setup = Setup(heads, kv_heads)
    committed = Setup(heads, kv_heads)  # the cache as it was before the step
    out = setup.attend(1, 0.3, sliding_window, softcap)
    assert out.shape == (len(TREES), setup.num_nodes, heads, SIZE)
    for b, tree in enumerate(TREES):
        for node in range(tree.num_nodes):
            expected = attend_slowly(committed, b, node, 1, 0.3, sliding_window, softcap)
            torch.testing.assert_close(out[b, node], expected, atol=1e-5, rtol=1e-5)


def test_nodes_are_written_after_the_committed_tokens_and_padding_only_to_the_trash_page():
    setup = Setup(4, 2)
    before = setup.cache.clone()
    setup.attend(layer=1)
    changed = torch.zeros(setup.cache.shape[2:4], dtype=torch.bool)
    for b, tree in enumerate(TREES):
        for node in range(tree.num_nodes):
            slot = setup.slot(b, LENGTHS[b] + node)
            changed[slot] = True
            assert torch.equal(setup.cache[1, 0][slot], setup.key[b, :, node])
            assert torch.equal(setup.cache[1, 1][slot], setup.value[b, :, node])
    changed[0] = True  # the trash page
    assert torch.equal(setup.cache[:, :, ~changed], before[:, :, ~changed])
    assert torch.equal(setup.cache[0, :, 1:], before[0, :, 1:])  # the other layer


def test_nothing_unwritten_reaches_a_valid_node():
    """Neither the trash page, nor others' pages, nor slots past the tree: huge numbers there change no bit."""
    setup, dirty = Setup(4, 2), Setup(4, 2)
    committed = torch.zeros(setup.cache.shape[2:4], dtype=torch.bool)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            committed[setup.slot(b, t)] = True
    dirty.cache[:, :, ~committed] = 1e4
    out, dirty_out = setup.attend(), dirty.attend()
    for b, tree in enumerate(TREES):
        assert torch.equal(out[b, : tree.num_nodes], dirty_out[b, : tree.num_nodes])
    assert torch.isfinite(dirty_out).all()  # padding may hold anything, but not NaN


def test_a_sequence_alone_gives_what_it_gives_in_a_batch():
    setup = Setup(4, 2)
    batched = setup.attend()
    for b, tree in enumerate(TREES):
        fresh, n = Setup(4, 2), tree.num_nodes
        alone = PagedTree(
            cache=fresh.cache,
            tables_BP=fresh.tables[[b]],
            length_B=torch.tensor([LENGTHS[b]]),
            depth_BN=torch.tensor([tree.depth]),
            valid_BN=torch.ones(1, n, dtype=torch.bool),
            ancestors_BNN=tree.ancestors[None],
        )
        out = alone.attend(1, fresh.query[[b], :, :n], fresh.key[[b], :, :n], fresh.value[[b], :, :n], 0.3, None, None)
        torch.testing.assert_close(out[0], batched[b, :n], atol=1e-6, rtol=1e-6)


def test_layers_with_and_without_a_window_take_turns():
    """Masks are kept for the step, one a window: hybrid models ask for both."""
    setup, step = Setup(4, 2), Setup(4, 2).step()
    for layer, window in [(0, None), (1, 3), (0, None), (1, 3)]:
        out = step.attend(layer, setup.query, setup.key, setup.value, 0.3, window, None)
        torch.testing.assert_close(out, setup.attend(layer, 0.3, window))


def test_low_precision_keeps_its_dtype_and_softcap_is_computed_in_float32():
    setup = Setup(4, 2)
    exact = setup.attend(softcap=0.8)
    low = Setup(4, 2)
    for name in ("cache", "query", "key", "value"):
        setattr(low, name, getattr(low, name).bfloat16())
    for softcap in (None, 0.8):
        assert low.attend(softcap=softcap).dtype == torch.bfloat16
    for b, tree in enumerate(TREES):
        torch.testing.assert_close(
            low.attend(softcap=0.8)[b, : tree.num_nodes].float(), exact[b, : tree.num_nodes], atol=0.05, rtol=0.05
        )


@pytest.mark.parametrize("seed", range(5))
def test_random_trees_of_up_to_64_nodes_equal_their_paths_as_chains(seed):
    """A node among 64 gives what it gives as the end of a chain of its own path."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    paths = [()]
    while len(paths) < 64:
        child = (*rng.choice([path for path in paths if len(path) < 6]), rng.randrange(8))
        if child not in paths:
            paths.append(child)
    tree, length, kv_heads = TokenTree.from_paths(paths), rng.randrange(1, 30), 2
    pages = (length + 63) // PAGE_SIZE + 1
    cache = torch.randn(1, 2, pages + 1, PAGE_SIZE, kv_heads, SIZE, generator=generator)
    tables = 1 + torch.randperm(pages, generator=generator)[None]
    query = torch.randn(1, 4, 64, SIZE, generator=generator)
    key, value = torch.randn(2, 1, kv_heads, 64, SIZE, generator=generator)

    def attend(nodes, depth, ancestors, window):
        count = len(nodes)
        step = PagedTree(
            cache.clone(),
            tables,
            torch.tensor([length]),
            torch.tensor([depth]),
            torch.ones(1, count, dtype=torch.bool),
            ancestors[None],
        )
        return step.attend(0, query[:, :, nodes], key[:, :, nodes], value[:, :, nodes], 0.5, window, None)[0]

    for window in (None, 4, length):
        out = attend(list(range(64)), tree.depth, tree.ancestors, window)
        for node in rng.sample(range(64), 12):
            path = tree.ancestors[node].nonzero().flatten().tolist()
            alone = attend(path, list(range(len(path))), torch.ones(len(path), len(path)).tril().bool(), window)
            torch.testing.assert_close(out[node], alone[-1], atol=1e-6, rtol=1e-5)
