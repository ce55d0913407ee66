"""The decoding step: exact acceptance has the law of plain decoding (by enumeration), typical equals its formula."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import fields

import pytest
import torch

from medusa.decoding import TreeBatch, Typical, accept, accept_typical, match, propose, typical
from medusa.sampling import SamplingBatch, SamplingParams
from medusa.tree import TokenTree

VOCAB, DEPTH = 5, 3
CPU = torch.device("cpu")
TREE = TokenTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 2), (0, 0, 0), (0, 0, 2), (1, 0, 1)])
GUESSES_KS = torch.tensor([[3, 0, 1], [4, 2, 0], [0, 1, 3]])  # fixed drafts of a fixed context, id 0 among them


def random_tree(rng, num_nodes, heads=DEPTH, width=3):
    paths = [()]
    while len(paths) < num_nodes:
        child = (*rng.choice([path for path in paths if len(path) < heads]), rng.randrange(width))
        if child not in paths:
            paths.append(child)
    return TokenTree.from_paths(paths)


def random_guesses(generator, batch, heads=DEPTH, width=3, vocab=VOCAB):
    """[B, K, S]: distinct tokens a head, as `topk` gives them."""
    return torch.rand(batch, heads, vocab, generator=generator).argsort(-1)[..., :width]


class ToyModel:
    """A language model of 5 tokens: logits of the next token for every text of up to DEPTH tokens, at random."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        texts = [text for length in range(DEPTH + 1) for text in itertools.product(range(VOCAB), repeat=length)]
        self.logits = {text: torch.randn(VOCAB, generator=generator) * 1.5 for text in texts}

    def node_logits(self, tree, tokens):
        """[N, V]: each node's logits given the drafts on its path."""
        return torch.stack([self.logits[draft_text(tree, tokens, node)] for node in range(tree.num_nodes)])

    def law(self, params):
        """The probabilities that plain decoding draws from, after temperature and restrictions."""
        batch = batch_of([params], [0])
        return {text: batch.distribution(row[None, None])[0, 0].softmax(-1) for text, row in self.logits.items()}


def batch_of(params, seeds):
    return SamplingBatch.stack(params, seeds, [0] * len(params), CPU)


def draft_text(tree, tokens, node):
    return tuple(int(tokens[i]) for i in tree.ancestors[node].nonzero().flatten().tolist() if i > 0)


def steps_of(model, params, rows):
    """`rows` independent decoding steps over TREE as the engine makes them, each with a seed of its own."""
    tree = repeated(TREE, rows)
    tokens_BN = propose(tree, torch.zeros(rows, dtype=torch.int64), GUESSES_KS.expand(rows, -1, -1))
    logits_BNV = model.node_logits(TREE, tokens_BN[0]).expand(rows, -1, -1)
    batch = batch_of([params] * rows, list(range(rows)))
    samples_BN = batch.sample(logits_BNV, torch.full((rows,), 10), tree.depth_BN)
    return tokens_BN, accept(tree, match(tree, tokens_BN, samples_BN), samples_BN)


def repeated(tree, rows):
    one = TreeBatch.stack([tree], CPU)
    tensors = {f.name: getattr(one, f.name) for f in fields(one) if f.name != "max_depth"}
    return TreeBatch(**{name: t.expand(rows, *t.shape[1:]) for name, t in tensors.items()}, max_depth=one.max_depth)


def emitted_words(tokens_BN, accepted):
    """What each step emits: the accepted drafts, then the bonus token."""
    words = []
    for tokens, path, bonus in zip(
        tokens_BN.tolist(), accepted.path_BD.tolist(), accepted.bonus_B.tolist(), strict=True
    ):
        words.append((*(tokens[node] for node in path[1:] if node >= 0), bonus))
    return words


def per_path_words(model, rows):
    """The fault to be caught: every leaf's path draws tokens of its own, and the longest match wins."""
    tokens = propose(TreeBatch.stack([TREE], CPU), torch.zeros(1, dtype=torch.int64), GUESSES_KS[None])[0].tolist()
    leaves = [node for node in range(TREE.num_nodes) if node not in TREE.parent]
    paths = [TREE.ancestors[leaf].nonzero().flatten().tolist() for leaf in leaves]
    laws = model.node_logits(TREE, tokens).softmax(-1).tolist()
    rng = random.Random(0)
    for _ in range(rows):
        words = []
        for path in paths:
            drawn = [rng.choices(range(VOCAB), laws[node])[0] for node in path]
            kept = 0
            while kept + 1 < len(path) and drawn[kept] == tokens[path[kept + 1]]:
                kept += 1
            words.append(tuple(drawn[: kept + 1]))
        yield max(words, key=len)


def continued(words, law):
    """Texts of DEPTH + 1 tokens: a step's words, then plain decoding. Their law shows any fault of the step."""
    rng, weights = random.Random(1), {text: row.tolist() for text, row in law.items()}
    for word in words:
        text = word
        while len(text) <= DEPTH:
            text = (*text, rng.choices(range(VOCAB), weights[text])[0])
        yield text


def chi_square_of_texts(words, law):
    """Pearson's statistic of the continued words against plain decoding, and its value at the 0.1 % level."""
    counts = Counter(continued(words, law))
    rows = counts.total()
    cells = {text: rows * text_probability(law, text) for text in itertools.product(range(VOCAB), repeat=DEPTH + 1)}
    common = {text for text, mean in cells.items() if mean >= 5}
    pairs = [(counts[text], cells[text]) for text in common]
    rare = sum(mean for text, mean in cells.items() if text not in common)
    if rare >= 5:
        pairs.append((sum(count for text, count in counts.items() if text not in common), rare))
    degrees = len(pairs) - 1
    spread = 2 / (9 * degrees)  # Wilson and Hilferty's approximation
    critical = degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3
    return sum((seen - mean) ** 2 / mean for seen, mean in pairs), critical


def text_probability(law, text):
    return math.prod(float(law[text[:i]][token]) for i, token in enumerate(text))


def word_law(law, tokens):
    """Every word that a step may emit, with its probability under plain decoding: a miss at some node ends it."""
    words = {}
    for node in range(TREE.num_nodes):
        text = draft_text(TREE, tokens, node)
        children = {int(tokens[child]) for child in range(1, TREE.num_nodes) if TREE.parent[child] == node}
        for token in set(range(VOCAB)) - children:
            words[(*text, token)] = text_probability(law, (*text, token))
    return words


SETTINGS = [{}, {"temperature": 0.6}, {"temperature": 1.3, "top_p": 0.85}, {"top_k": 3}, {"min_p": 0.2}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_emits_tokens_with_the_law_of_plain_decoding(settings):
    model, params = ToyModel(), SamplingParams(**settings)
    tokens_BN, accepted = steps_of(model, params, rows=20_000)
    statistic, critical = chi_square_of_texts(emitted_words(tokens_BN, accepted), model.law(params))
    assert statistic < critical


def test_the_same_test_catches_a_sampler_that_draws_once_a_path():
    model = ToyModel()
    statistic, critical = chi_square_of_texts(per_path_words(model, rows=5_000), model.law(SamplingParams()))
    assert statistic > 2 * critical


@pytest.mark.parametrize("settings", SETTINGS)
def test_emitted_tokens_on_average_are_the_sum_of_the_nodes_path_probabilities(settings):
    model, params = ToyModel(), SamplingParams(**settings)
    tokens_BN, accepted = steps_of(model, params, rows=20_000)
    law = model.law(params)
    expected = sum(text_probability(law, draft_text(TREE, tokens_BN[0], node)) for node in range(TREE.num_nodes))
    words = word_law(law, tokens_BN[0])
    assert sum(words.values()) == pytest.approx(1, abs=1e-5)
    assert sum(len(word) * p for word, p in words.items()) == pytest.approx(expected, abs=1e-5)
    num_B = accepted.num_B.float()
    assert float(num_B.mean()) == pytest.approx(expected, abs=4 * float(num_B.std()) / math.sqrt(len(num_B)))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, *SETTINGS])
def test_a_step_emits_the_very_tokens_that_plain_decoding_draws_with_its_seed(settings):
    model, params, rows = ToyModel(), SamplingParams(**settings), 300
    tokens_BN, accepted = steps_of(model, params, rows)
    root = torch.zeros(1, 1, dtype=torch.int64)
    for seed, word in enumerate(emitted_words(tokens_BN, accepted)):
        batch, text = batch_of([params], [seed]), ()
        for position in range(10, 10 + len(word)):
            logits_11V = model.logits[text][None, None]
            text = (*text, int(batch.sample(logits_11V, torch.tensor([position]), root)))
        assert word == text


@pytest.mark.parametrize("seed", range(20))
def test_accepting_equals_descending_by_hand_in_ragged_batches(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    trees = [random_tree(rng, size) for size in (1, 2, 5, 9, 13)]
    batch = TreeBatch.stack(trees, CPU)
    roots = torch.randint(VOCAB, (len(trees),), generator=generator)
    guesses_BKS = random_guesses(generator, len(trees))
    tokens_BN = propose(batch, roots, guesses_BKS)
    samples_BN = torch.randint(VOCAB, tokens_BN.shape, generator=generator)
    accepted = accept(batch, match(batch, tokens_BN, samples_BN), samples_BN)
    for b, tree in enumerate(trees):
        node, path = 0, [0]
        while True:
            drawn = int(samples_BN[b, node])
            held = [
                child
                for child in range(tree.num_nodes)
                if tree.parent[child] == node and drawn == int(guesses_BKS[b, tree.depth[child] - 1, tree.rank[child]])
            ]
            if not held:
                break
            (node,) = held
            path.append(node)
        assert accepted.path_BD[b].tolist() == path + [-1] * (batch.max_depth + 1 - len(path))
        assert int(accepted.num_B[b]) == len(path) == tree.depth[node] + 1
        assert int(accepted.last_B[b]) == node
        assert int(accepted.bonus_B[b]) == int(samples_BN[b, node])


def test_proposals_follow_depth_and_rank():
    tree = TokenTree.from_paths([(0,), (2,), (2, 1), (2, 1, 0)])
    guesses_BKS = torch.tensor([[[10, 11, 12], [20, 21, 22], [30, 31, 32]]])
    tokens_BN = propose(TreeBatch.stack([tree], CPU), torch.tensor([7]), guesses_BKS)
    assert tokens_BN.tolist() == [[7, 10, 12, 21, 30]]


@pytest.mark.parametrize("seed", range(20))
def test_padding_is_never_accepted_even_where_token_0_is_the_true_next_token(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    small, large = random_tree(rng, rng.randrange(1, 6)), random_tree(rng, 14)
    batch, alone = TreeBatch.stack([small, large], CPU), TreeBatch.stack([small], CPU)
    roots = torch.tensor([0, 0])
    guesses_BKS = random_guesses(generator, 2)
    guesses_BKS[:, :, 0] = 0
    tokens_BN = propose(batch, roots, guesses_BKS)
    samples_BN = torch.zeros_like(tokens_BN)  # token 0 is what the model says everywhere
    accepted = accept(batch, match(batch, tokens_BN, samples_BN), samples_BN)
    expected = accept(alone, match(alone, tokens_BN[:1, : small.num_nodes], samples_BN[:1]), samples_BN[:1])
    assert int(accepted.last_B[0]) == int(expected.last_B[0]) < small.num_nodes
    assert int(accepted.num_B[0]) == int(expected.num_B[0])
    # Not even where a rule would keep every node: only what is valid can be accepted.
    everything = accept(batch, torch.ones_like(tokens_BN, dtype=torch.bool), samples_BN)
    assert int(everything.num_B[0]) == small.max_depth + 1
    assert int(everything.last_B[0]) < small.num_nodes


def test_nodes_made_invalid_after_stacking_are_not_accepted():
    """Rows without guesses yet decode plainly inside a batch of trees."""
    batch = TreeBatch.stack([TREE, TREE], CPU)
    batch.valid_BN[0] = batch.depth_BN[0] == 0
    tokens_BN = torch.zeros(2, TREE.num_nodes, dtype=torch.int64)
    accepted = accept(batch, match(batch, tokens_BN, tokens_BN), tokens_BN)
    assert accepted.num_B.tolist() == [1, 1 + TREE.max_depth]
    assert accepted.last_B[0] == 0


def typically(tree, tokens_BN, logits_BNV, samples_BN, batch, rule):
    return accept_typical(tree, tokens_BN, logits_BNV, batch.distribution(logits_BNV), samples_BN, batch.exact, rule)


def slow_typical(tree, tokens, logits, rule):
    """All paths by enumeration: the longest whose drafts are all typical, then the most likely."""
    logprobs = logits.double().log_softmax(-1)
    entropy = [-sum(math.exp(p) * p for p in row if p > -math.inf) for row in logprobs.tolist()]
    candidates = []
    for node in range(tree.num_nodes):
        drafts = [i for i in tree.ancestors[node].nonzero().flatten().tolist() if i > 0]
        scores = [(float(logprobs[tree.parent[i], tokens[i]]), entropy[tree.parent[i]]) for i in drafts]
        if all(math.exp(logprob) > min(rule.epsilon, rule.delta * math.exp(-h)) for logprob, h in scores):
            candidates.append((len(drafts), sum(logprob for logprob, _ in scores), node))
    return max(candidates)[2]


@pytest.mark.parametrize("root", ["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(40))
def test_typical_acceptance_equals_its_formula_by_enumeration(seed, root):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rule = Typical(epsilon=rng.choice([0.09, 0.3, 0.9]), delta=rng.choice([0.1, 0.3, 1.0]), root=root)
    trees = [random_tree(rng, size) for size in (13, 6, 1)]
    params = [SamplingParams(temperature=0.7), SamplingParams(top_p=0.9), SamplingParams(top_k=3)]
    tree, batch = TreeBatch.stack(trees, CPU), batch_of(params, [1, 2, 3])
    tokens_BN = propose(tree, torch.zeros(3, dtype=torch.int64), random_guesses(generator, 3))
    logits_BNV = 2 * torch.randn(*tokens_BN.shape, VOCAB, generator=generator)
    samples_BN = batch.sample(logits_BNV, torch.tensor([5, 6, 7]), tree.depth_BN)
    accepted = typically(tree, tokens_BN, logits_BNV, samples_BN, batch, rule)
    drawn_from_BNV = batch.distribution(logits_BNV)
    for b in range(3):
        last = slow_typical(trees[b], tokens_BN[b], drawn_from_BNV[b], rule)
        bonus = logits_BNV[b, last].argmax() if root == "greedy" else samples_BN[b, last]
        assert int(accepted.last_B[b]) == last
        assert int(accepted.bonus_B[b]) == int(bonus)
        path = trees[b].ancestors[last].nonzero().flatten().tolist()
        assert [node for node in accepted.path_BD[b].tolist() if node >= 0] == path


def test_typical_keeps_several_siblings_and_the_most_likely_path_wins():
    tree = TreeBatch.stack([TokenTree.from_paths([(0,), (1,), (0, 0), (1, 0)])], CPU)
    tokens_BN = torch.tensor([[0, 1, 2, 3, 3]])
    logits_1NV = torch.full((1, 5, VOCAB), -20.0)
    logits_1NV[0, 0, 1], logits_1NV[0, 0, 2] = math.log(0.55), math.log(0.45)
    logits_1NV[0, 1, 3], logits_1NV[0, 1, 4] = math.log(0.3), math.log(0.7)
    logits_1NV[0, 2, 3], logits_1NV[0, 2, 4] = math.log(0.9), math.log(0.1)
    kept = typical(tree, tokens_BN, logits_1NV, Typical(root="greedy"))
    assert kept.tolist() == [[True] * 5]
    batch = batch_of([SamplingParams()], [0])
    accepted = typically(tree, tokens_BN, logits_1NV, torch.zeros_like(tokens_BN), batch, Typical(root="greedy"))
    assert accepted.path_BD.tolist() == [[0, 2, 4]]  # 0.45 * 0.9 beats 0.55 * 0.3


@pytest.mark.parametrize("root", ["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(5))
def test_typical_is_greedy_matching_at_temperature_0_beside_rows_that_sample(seed, root):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    trees = [random_tree(rng, 10) for _ in range(4)]
    tree = TreeBatch.stack(trees, CPU)
    params = [SamplingParams(temperature=float(t)) for t in (0, 1, 0, 1)]
    batch = batch_of(params, [1, 2, 3, 4])
    tokens_BN = propose(tree, torch.zeros(4, dtype=torch.int64), random_guesses(generator, 4))
    logits_BNV = torch.randn(*tokens_BN.shape, VOCAB, generator=generator)
    samples_BN = batch.sample(logits_BNV, torch.zeros(4, dtype=torch.int64), tree.depth_BN)
    rule = Typical(epsilon=0.01, delta=0.01, root=root)
    lossy = typically(tree, tokens_BN, logits_BNV, samples_BN, batch, rule)
    greedy = accept(tree, match(tree, tokens_BN, logits_BNV.argmax(-1)), logits_BNV.argmax(-1))
    for b in (0, 2):
        assert lossy.path_BD[b].tolist() == greedy.path_BD[b].tolist()
        assert lossy.bonus_B[b] == greedy.bonus_B[b]
    assert lossy.num_B[[1, 3]].sum() >= greedy.num_B[[1, 3]].sum()


@pytest.mark.parametrize("root", ["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(5))
def test_a_row_that_asks_for_exact_is_matched_to_its_draws_beside_typical_ones(seed, root):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tree = TreeBatch.stack([random_tree(rng, 10) for _ in range(4)], CPU)
    params = [SamplingParams(temperature=0.9, acceptance="exact" if b % 2 else None) for b in range(4)]
    batch = batch_of(params, [1, 2, 3, 4])
    tokens_BN = propose(tree, torch.zeros(4, dtype=torch.int64), random_guesses(generator, 4))
    logits_BNV = torch.randn(*tokens_BN.shape, VOCAB, generator=generator)
    samples_BN = batch.sample(logits_BNV, torch.zeros(4, dtype=torch.int64), tree.depth_BN)
    rule = Typical(epsilon=0.01, delta=0.01, root=root)
    mixed = typically(tree, tokens_BN, logits_BNV, samples_BN, batch, rule)
    exact = accept(tree, match(tree, tokens_BN, samples_BN), samples_BN)
    loose = typically(
        tree, tokens_BN, logits_BNV, samples_BN, batch_of([SamplingParams(temperature=0.9)] * 4, [1, 2, 3, 4]), rule
    )
    for b in range(4):
        wanted = exact if b % 2 else loose
        assert mixed.path_BD[b].tolist() == wanted.path_BD[b].tolist()
        assert mixed.bonus_B[b] == wanted.bonus_B[b]
    assert not batch.all_exact and batch.exact.tolist() == [False, True, False, True]


def test_a_draft_outside_the_restricted_distribution_is_not_typical():
    tree = TreeBatch.stack([TokenTree.from_paths([(0,)])], CPU)
    logits_1NV = torch.tensor([[[0.0, -1.0, -math.inf, -math.inf, -math.inf]] * 2])
    kept = typical(tree, torch.tensor([[0, 3]]), logits_1NV, Typical())
    assert kept.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "0 < epsilon < 1"),
        ({"epsilon": 1.0}, "0 < epsilon < 1"),
        ({"delta": 0.0}, "0 < delta <= 1"),
        ({"delta": 1.5}, "0 < delta <= 1"),
        ({"root": "argmax"}, "'greedy' or 'sampled', got 'argmax'"),
    ],
)
def test_typical_rules_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Typical(**settings)
