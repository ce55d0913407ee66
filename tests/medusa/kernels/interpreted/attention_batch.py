"""Steps to try attention on: random pages, trees or chains, and what the plain twin makes of them.

Whatever a launch has no business to read is NaN: free pages, slots past a sequence's end, angles of other launches.
"""

from __future__ import annotations

import random

import torch

from medusa.kernels.attention import attend
from medusa.kernels.attention_plan import AttentionPlan, Rotation, Scratch, Visible
from medusa.kernels.tree_attention import PagedTree

WIDTH = 8  # pages of a row
LENGTHS = (0, 1, 5, 17, 33, 70)
NAN = float("nan")


class Batch:
    """Random rows of a cache, trees (or chains) behind them, and queries, keys and values of the nodes.

    `projected` are those as a step's product gives them; `query` and the cache have them rotated.
    """

    def __init__(
        self, seed, counts, *, heads, groups, size, room=64, chain=False, page_size=32, lengths=LENGTHS, width=WIDTH
    ):  # fmt: skip
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.counts, self.chain, self.heads, self.size, self.page_size = counts, chain, heads, size, page_size
        num_rows, total = len(counts) + 2, sum(counts) + 3
        self.rows = rng.sample(range(num_rows - 1), len(counts))
        self.length = torch.tensor([rng.choice(lengths) for _ in range(num_rows - 1)] + [0])
        pages = 1 + torch.randperm(num_rows * width, generator=generator)
        self.tables = pages.view(num_rows, width).int()
        self.depth = torch.zeros(num_rows, room, dtype=torch.int32)
        self.ancestors = torch.eye(room, dtype=torch.bool).repeat(num_rows, 1, 1)
        for row in range(num_rows):
            for node in range(1, room):
                parent = node - 1 if chain else rng.randrange(node)
                self.depth[row, node] = self.depth[row, parent] + 1
                self.ancestors[row, node] |= self.ancestors[row, parent]
        bit = torch.ones(64, dtype=torch.int64) << torch.arange(64)
        self.bits = (self.ancestors.view(num_rows, room, room // 64, 64).long() * bit).sum(-1)
        self.projected = torch.randn(total, heads + 2 * groups, size, generator=generator)
        self.rotation = Rotation(self._positions(), *_angles(size, max(512, width * page_size)))
        query, key, value = self.projected.split([heads, groups, groups], 1)
        self.query, key = (_rotated(each, self.rotation) for each in (query, key))
        self.cache = torch.full((2, num_rows * width + 1, page_size, groups, size), NAN)
        for row, nodes in self.sequences():
            length = int(self.length[row])
            self.cache[self.places(row, 0, length)] = torch.randn(2, length, groups, size, generator=generator)
            self.cache[self.places(row, length, len(nodes))] = torch.stack([key[nodes], value[nodes]])

    @property
    def starts(self):
        return [sum(self.counts[:b]) for b in range(len(self.counts))]

    def sequences(self):
        """Each one's batch row and nodes."""
        for row, start, count in zip(self.rows, self.starts, self.counts, strict=True):
            yield row, range(start, start + count)

    def places(self, row, first, count):
        """Index into the cache of so many tokens of a row, from the `first` on."""
        token = torch.arange(first, first + count)
        return slice(None), self.tables[row, token // self.page_size].long(), token % self.page_size

    def run(
        self, splits, *, rows=16, columns=32, warps=2, merged_in_place=2, ring=False, fresh=False, stuck=None, **options
    ):  # fmt: skip
        """The kernel's result. Rows of no sequence, and those between, must have been left alone, and the cache be what
        it was; with `fresh` the launch rotates, and puts the nodes' keys and values there, by itself. The `stuck`
        counter of splits starts so high that nobody merges these."""
        plan = AttentionPlan(
            splits, rows, columns, max(self.counts), warps=warps, teams=warps if rows < 64 else 1,
            merged_in_place=merged_in_place, ring=ring,
        )  # fmt: skip
        visible = Visible(
            *(torch.tensor(values, dtype=torch.int32) for values in (self.rows, self.starts, self.counts)),
            self.length, self.tables, *((None, None) if self.chain else (self.bits, self.depth)),
        )  # fmt: skip
        room = splits * len(self.query)
        arrived, left = torch.zeros(2, 4096, dtype=torch.int32)
        if stuck is not None:
            arrived[stuck], left[stuck] = 100, 100 + splits
        scratch = Scratch(
            torch.full((room, self.heads, self.size), NAN), torch.full((room, self.heads), NAN), arrived
        )  # fmt: skip
        wide = torch.full((len(self.query), self.heads + 1, self.size), NAN)
        out, cache = wide[:, :-1], self.cache.clone()
        query, rotation = (self.projected, self.rotation) if fresh else (self.query, None)
        for row, nodes in self.sequences() if fresh else ():
            cache[self.places(row, int(self.length[row]), len(nodes))] = NAN
        attend(query, cache, visible, plan, out, scratch, 0.3, rotation=rotation, **options)
        assert torch.equal(arrived, left)
        assert wide[sum(self.counts) :].isnan().all()
        assert wide[:, -1].isnan().all()
        torch.testing.assert_close(cache, self.cache, atol=1e-6, rtol=1e-6, equal_nan=True)
        return out

    def expected(self, window=None, softcap=None):
        """The plain twin's, one sequence at a time: it writes the same keys and values where they are already."""
        out = torch.full((len(self.query), self.heads, self.size), NAN)
        for row, nodes in self.sequences():
            if nodes:
                out[nodes] = self._one(row, nodes, window, softcap)
        return out

    def _one(self, row, nodes, window, softcap):
        count, length = len(nodes), int(self.length[row])
        step = PagedTree(
            self.cache[None].clone(), self.tables[None, row].long(), self.length[None, row],
            self.depth[None, row, :count].long(), torch.ones(1, count, dtype=torch.bool),
            self.ancestors[None, row, :count, :count],
        )  # fmt: skip
        new = self.cache[self.places(row, length, count)].transpose(1, 2)
        query = self.query[None, nodes].transpose(1, 2)
        return step.attend(0, query, new[None, 0], new[None, 1], 0.3, window, softcap)[0]

    def _positions(self):
        position = torch.zeros(len(self.projected), dtype=torch.int64)
        for row, nodes in self.sequences():
            position[nodes] = self.length[row] + self.depth[row, : len(nodes)].long()
        return position


def _angles(size, positions):
    """cos and sin of half a head's angles, in rows that lie further apart."""
    angle = torch.arange(positions)[:, None] / 100 ** torch.linspace(0, 1, size // 2)
    return tuple(
        torch.cat([each, torch.full_like(each, NAN)], 1)[:, : size // 2] for each in (angle.cos(), angle.sin())
    )


def _rotated(heads_MHD, rotation):
    cos, sin = (each[rotation.position_M, None] for each in (rotation.cos_TD, rotation.sin_TD))
    first, second = heads_MHD.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
