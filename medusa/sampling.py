"""How a token is drawn from logits: a request's sampling parameters, and their effect on a batch of tree nodes.

Shapes: B sequences, N nodes a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import torch

from medusa.grammar import Grammar
from medusa.noise import gumbel

MAX_SEED = 2**63 - 1
MAX_INT = 2**31 - 1  # counts are 32-bit integers on the device
MAX_TEMPERATURE = 1e6  # beyond it a draw is uniform anyway; float32 must hold it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of decoding; names and meanings are those of OpenAI's API and vLLM.

    `temperature` 0 is greedy. `top_k` 0 keeps all tokens. `stop` strings and `stop_token_ids` end a reply, as the
    model's EOS does unless `ignore_eos`. `n` replies are drawn a prompt. `logprobs` asks for that many alternatives a
    token (of the model's own distribution, before temperature and penalties), `prompt_logprobs` the same for the
    prompt's tokens; the prompt is then computed whole, whatever is cached. Without a `seed` one is drawn and
    returned with the reply. `acceptance` "exact" asks for the model's own law from an engine whose rule is another.
    A lower `priority` is served earlier. Under a `grammar` the reply follows it and ends where it may end.
    Raises ValueError for values out of range.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    acceptance: Literal["exact"] | None = None
    priority: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _require(1 <= self.max_tokens <= MAX_INT, "max_tokens", self.max_tokens, f"1 to {MAX_INT}")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "0 to max_tokens")
        hottest = f"0 (greedy) to {MAX_TEMPERATURE:g}"
        _require(0 <= self.temperature <= MAX_TEMPERATURE, "temperature", self.temperature, hottest)
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        _require(0 <= self.top_k <= MAX_INT, "top_k", self.top_k, f"0 (all tokens) to {MAX_INT}")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _require(
            isinstance(self.stop, (tuple, list)) and all(self.stop), "stop", self.stop, "several strings, none empty"
        )
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "-2 to 2")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "-2 to 2")
        _require(
            all(map(isfinite, self.logit_bias.values())), "logit_bias", self.logit_bias, "finite numbers by token id"
        )
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "None, 0 or more")
        _require(
            self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "prompt_logprobs",
            self.prompt_logprobs,
            "None, 0 or more",
        )
        _require(self.grammar is None or not self.ignore_eos, "ignore_eos", self.ignore_eos, "False under a grammar")
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(
            self.acceptance in ("exact", None), "acceptance", self.acceptance, "'exact', or None for the engine's own"
        )

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are drawn from other logits than the model's own."""
        return bool(self.logit_bias) or self.has_penalties or self.grammar is not None

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of B sequences as tensors on the device. `exact` rows decode as drawn, whatever the
    engine's rule: greedy ones and those that ask for it."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    choice: torch.Tensor
    exact: torch.Tensor
    all_exact: bool
    all_greedy: bool
    any_restricted: bool

    @classmethod
    def stack(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], choices: Sequence[int], device: torch.device
    ) -> SamplingBatch:
        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        exact = [p.temperature == 0 or p.acceptance == "exact" for p in params]
        return cls(
            temperature=column([p.temperature for p in params], torch.float32),
            top_p=column([p.top_p for p in params], torch.float32),
            top_k=column([p.top_k for p in params], torch.int64),
            min_p=column([p.min_p for p in params], torch.float32),
            seed=column(seeds, torch.int64),
            choice=column(choices, torch.int64),
            exact=column(exact, torch.bool),
            all_exact=all(exact),
            all_greedy=all(p.temperature == 0 for p in params),
            any_restricted=any(p.top_p < 1 or p.top_k or p.min_p for p in params),
        )

    def distribution(self, logits_BNV: torch.Tensor) -> torch.Tensor:
        """Logits over temperature, with tokens outside top-k, top-p and min-p at -inf: what sampling draws from.

        Rows at temperature 0 keep their logits.
        """
        # The floor keeps quotients finite; below it every draw is the argmax anyway.
        temperature = torch.where(self.temperature == 0, 1.0, self.temperature.clamp(min=1e-6))
        scaled = logits_BNV.float() / temperature[:, None, None]
        return self._restricted(scaled) if self.any_restricted else scaled

    def sample(self, logits_BNV: torch.Tensor, position_B: torch.Tensor, depth_BN: torch.Tensor) -> torch.Tensor:
        """One token a node, [B, N]: the argmax, or a draw whose noise is keyed by the token's absolute position.

        `position_B` is the position of the token that follows the root; a node at depth d draws for d more.
        """
        if self.all_greedy:
            return logits_BNV.argmax(-1)
        depths = torch.arange(int(depth_BN.max()) + 1, device=logits_BNV.device)
        shape = (len(position_B), len(depths))
        noise_BDV = gumbel(
            self.seed[:, None].expand(shape),
            self.choice[:, None].expand(shape),
            position_B[:, None] + depths,
            logits_BNV.shape[-1],
        )
        noise_BDV.masked_fill_((self.temperature == 0)[:, None, None], 0.0)
        rows = torch.arange(len(position_B), device=logits_BNV.device)[:, None]
        return self.distribution(logits_BNV).add_(noise_BDV[rows, depth_BN]).argmax(-1)

    def _restricted(self, logits_BNV: torch.Tensor) -> torch.Tensor:
        """Exact top-k, top-p and min-p, in vLLM's order: min-p first, then top-k, then top-p over what is left."""
        floor = logits_BNV.amax(-1, keepdim=True) + self.min_p.log()[:, None, None]
        logits_BNV = logits_BNV.masked_fill(logits_BNV < floor, float("-inf"))
        num_nodes = logits_BNV.shape[1]
        top_k_R, top_p_R = (each_B.repeat_interleave(num_nodes) for each_B in (self.top_k, self.top_p))
        return _keep_top(logits_BNV.flatten(0, 1), top_k_R, top_p_R).view_as(logits_BNV)


def _keep_top(logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """Each row's `top_k` best tokens (0: all), of them the fewest that reach `top_p`, at least one; the others at -inf.

    Of equal logits the first tokens stay.
    """
    lowest_R, count_R = _last_kept(logits_RV, top_k_R, top_p_R)
    dropped_RV = logits_RV < lowest_R[:, None]
    tied = (logits_RV.shape[1] - dropped_RV.sum(-1) > count_R) & (lowest_R > float("-inf"))
    for row in tied.nonzero().flatten().tolist():
        equal = (logits_RV[row] == lowest_R[row]).nonzero().flatten()
        surplus = int(logits_RV.shape[1] - dropped_RV[row].sum() - count_R[row])
        dropped_RV[row, equal[len(equal) - surplus :]] = True
    return logits_RV.masked_fill(dropped_RV, float("-inf"))


def _last_kept(
    logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest logit that stays in each row, and how many tokens stay. No more of a row is sorted than that takes."""
    vocab_size = logits_RV.shape[1]
    limit_R = torch.where(top_k_R > 0, top_k_R.clamp(max=vocab_size), vocab_size)
    lowest_R, count_R = torch.full_like(top_p_R, float("-inf")), limit_R.clone()
    open_rows = ((limit_R < vocab_size) | (top_p_R < 1)).nonzero().flatten()
    for width in (64, 512, vocab_size):
        logits_OV, limit_O, top_p_O = logits_RV[open_rows], limit_R[open_rows], top_p_R[open_rows]
        best_OW = logits_OV.topk(min(width, vocab_size)).values
        rank_W = torch.arange(best_OW.shape[1], device=best_OW.device)
        in_limit_OW = rank_W < limit_O[:, None]
        weight_OW = (best_OW - best_OW[:, :1]).exp() * in_limit_OW
        whole_O = (logits_OV - best_OW[:, :1]).exp().sum(-1)
        share_OW = weight_OW / torch.where(limit_O < vocab_size, weight_OW.sum(-1), whole_O)[:, None]
        before_OW = share_OW.cumsum(-1) - share_OW
        in_nucleus_OW = (before_OW < top_p_O[:, None]) | (top_p_O >= 1)[:, None] | (rank_W == 0)
        count_O = (in_limit_OW & in_nucleus_OW).sum(-1)
        lowest_R[open_rows] = best_OW.gather(1, count_O[:, None] - 1)[:, 0]
        count_R[open_rows] = count_O
        settled_O = torch.where(limit_O < vocab_size, limit_O <= width, count_O < width)
        open_rows = open_rows[~settled_O]
        if width >= vocab_size or not len(open_rows):
            break
    return lowest_R, count_R


def penalise(
    logits_NV: torch.Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    tokens_N: torch.Tensor,
    ancestors_NN: torch.Tensor,
) -> torch.Tensor:
    """Logits of one sequence's nodes after logit_bias and penalties, each node counting the tokens on its own path.

    `output_ids` ends with the root's token; `tokens_N` and `ancestors_NN` are the tree's (ancestor-or-self).
    """
    num_nodes, vocab_size = logits_NV.shape
    logits_NV = logits_NV.float().clone()
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits_NV.device)
        logits_NV[:, ids] += torch.tensor(list(params.logit_bias.values()), device=logits_NV.device)
    if not params.has_penalties:
        return logits_NV
    drafts = ancestors_NN.clone()
    drafts[:, 0] = False  # the root's token is already the last of output_ids
    counts_NV = _count(output_ids, vocab_size, logits_NV.device).repeat(num_nodes, 1)
    counts_NV.scatter_add_(1, tokens_N.expand(num_nodes, -1), drafts.float())
    seen = (counts_NV > 0) | (_count(prompt_ids, vocab_size, logits_NV.device) > 0)
    scaled = torch.where(logits_NV > 0, logits_NV / params.repetition_penalty, logits_NV * params.repetition_penalty)
    logits_NV = torch.where(seen, scaled, logits_NV)
    return logits_NV - params.frequency_penalty * counts_NV - params.presence_penalty * (counts_NV > 0)


def forbid_end(
    logits_NV: torch.Tensor, stop_ids: Sequence[int], num_tokens: int, min_tokens: int, depth_N: torch.Tensor
) -> torch.Tensor:
    """Logits of one sequence's nodes with `stop_ids` at -inf where the token drawn would be too early to end a reply:
    a node at depth d draws the one after `num_tokens` + d others."""
    early_N1 = (num_tokens + depth_N < min_tokens)[:, None]
    ids = torch.tensor(stop_ids, dtype=torch.int64, device=logits_NV.device)
    return logits_NV.index_copy(1, ids, logits_NV[:, ids].masked_fill(early_N1, float("-inf")))


def restrict(logits_NV: torch.Tensor, allowed_NV: torch.Tensor) -> torch.Tensor:
    """Logits with the tokens that are not allowed at -inf; where no other token is left, such as an end that comes
    before `min_tokens`, the allowed ones count alike."""
    restricted_NV = logits_NV.float().masked_fill(~allowed_NV, float("-inf"))
    only_N1 = restricted_NV.isneginf().all(-1, keepdim=True)
    return torch.where(only_N1 & allowed_NV, 0.0, restricted_NV)


def _count(token_ids: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    ids = torch.as_tensor(list(token_ids), dtype=torch.int64, device=device)
    return torch.bincount(ids, minlength=vocab_size).float()
