"""Dr.GRPO (Liu et al., arXiv 2503.20783): token log-probs, and every rollout's own gradient.

No function here can see a ``Grade``: the strict oracle's verdict cannot reach a gradient except through the reward that
the environment pays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from projected_grpo.antipasto import Knobs
from projected_grpo.data_types import RowGrads

LOGIT_BUDGET = 1 << 26
"""Floats of logits held at once (256 MB in float32); more tokens than fit are done in chunks and recomputed."""

LOT_TOKENS = 2048
"""Tokens that go through the model at once, padding included: enough to keep it busy, few enough for the caches."""


def collate(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s-1"]]:
    """Rows of prompt + completion, padded on the right, and the mask of targets.

    mask[i, t] says that token t+1 of row i belongs to its completion. It comes from the true lengths, never from
    comparing with the pad token: where pad = eos that would drop the end-of-turn token from the loss. Under
    causal attention nothing real attends to padding on the right, so no attention mask is needed.
    """
    s = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(prompts), s), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), s - 1, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        ids[i, : len(p) + len(c)] = torch.tensor([*p, *c])
        mask[i, len(p) - 1 : len(p) + len(c) - 1] = True
    return ids.to(device), mask.to(device)


class _WideHead(torch.autograd.Function):
    """x Wᵀ of 16-bit x (n d) and frozen W (v d), in float32 as the products are summed: rounded to bfloat16, logits of
    16 to 32 would lie .125 apart. The gradient goes back in W's dtype, as any other in the model does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return torch.mm(x, W.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ W.float().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        return grad.to(W.dtype) @ W, None


def logits_of(head: nn.Module, h: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """The head's logits, float32 or wider whatever the model's dtype: of the sampler and of the loss alike."""
    if head.weight.dtype in (torch.float32, torch.float64):
        return head(h)
    logits = _WideHead.apply(h, head.weight)
    return logits if getattr(head, "bias", None) is None else logits + head.bias


def token_logprobs(
    model: nn.Module, ids: Int[Tensor, "b s"], mask: Bool[Tensor, "b s-1"], temperature: float = 1.0
) -> Float[Tensor, " n"]:
    """log π(token) of the n masked targets, in row-major order of ``mask``, float32 or wider.

    The vocabulary's logits are formed on completion tokens only, and where they would exceed ``LOGIT_BUDGET``
    in chunks that the backward recomputes, so peak memory does not grow with b · s · vocabulary.
    """
    head = model.get_output_embeddings()
    h = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[mask]
    targets = ids[:, 1:][mask]

    def chosen(h: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(head, h) / temperature
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    n = max(1, LOGIT_BUDGET // head.weight.shape[0])
    if len(h) <= n:
        return chosen(h, targets)
    chunks = zip(h.split(n), targets.split(n), strict=True)
    return torch.cat([checkpoint(chosen, hc, tc, use_reentrant=False) for hc, tc in chunks])


MAX_LOG_RATIO = 10.0
"""|log π_ref − log π| of a token at most, in the KL term: one token of exp(d) must not outweigh all others."""


def lots(
    mask: Bool[Tensor, "b t"], rows: Int[Tensor, " n"], most: int, tokens: int = LOT_TOKENS
) -> list[Int[Tensor, " m"]]:
    """The rows sorted by length, longest first, in lots of at most ``most`` rows and so many tokens.

    So hardly anything is padding. A lot has one row at least.
    """
    lengths = (mask.shape[1] - mask.flip(1).int().argmax(1))[rows].tolist()
    made: list[list[int]] = []
    longest = 0
    for length, row in sorted(zip(lengths, rows.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1])):
        if not made or len(made[-1]) == most or (len(made[-1]) + 1) * longest > tokens:
            made.append([])
            longest = length
        made[-1].append(row)
    return [torch.tensor(lot, device=rows.device) for lot in made]


def row_gradients(
    model: nn.Module,
    knobs: Knobs,
    ids: Int[Tensor, "b s"],
    mask: Bool[Tensor, "b s-1"],
    weight: Float[Tensor, " b"],
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    kl_weight: float = 0.0,
    kl_rows: Bool[Tensor, " b"] | None = None,
    drawn: Float[Tensor, "b s-1"] | None = None,
    cap: float | None = None,
    micro_batch: int = 64,
    lot_tokens: int = LOT_TOKENS,
    agree: Callable[[list[Tensor], Tensor], list[Tensor]] | None = None,
) -> RowGrads:
    """Every row's gradient of L = −Σ_i w_i Σ_t c_it ρ_it + β · kl_weight · Σ_it (exp(d) − d − 1), from one backward;
    where β > 0 a second one tells the policy's term alone, which detectors read.

    ρ = exp(log π − log π_old) with π_old = π: one inner step, so the clip never acts and no second forward is
    needed; cached teacher rows have ρ = 1 by the same token. c_it = min(exp(log π − drawn_it), cap) is a constant: the
    truncated importance weight of a token drawn at log-prob ``drawn`` by a sampler whose arithmetic or support is not
    the trainer's; 1 where drawn is NaN, and everywhere without a cap. w_i = A_i / (group · max_new · prompts); with
    w = +1 on a hack and −1 on a clean completion this is the gradient that the hack direction is extracted from.
    d = log π_ref − log π, π_ref the model with its knobs off (K3 estimator, Schulman), clamped, over ``kl_rows`` (all
    when None): on tokens that the policy did not draw, a teacher's, K3 estimates no KL and may explode. Rows without
    weight and without KL are skipped: their gradient is zero; of rows that are alike in everything one goes through for
    all. They are taken in ``lots`` of like length, each trimmed to its longest row; ``agree`` (of lots and mask) may
    divide them anew, where processes that share the weights must run equally many. Raises FloatingPointError on a
    non-finite loss.
    """
    exact = torch.promote_types(model.dtype, torch.float32)
    zeros = lambda: {n: torch.zeros(len(ids), m.delta.numel(), dtype=exact, device=ids.device)
                     for n, m in knobs.modules.items()}  # fmt: skip
    G = zeros()
    policy = zeros() if beta else G
    drawn = torch.full_like(mask, torch.nan, dtype=exact) if drawn is None else drawn
    in_kl = torch.full_like(weight, bool(beta), dtype=torch.bool) if kl_rows is None else kl_rows & bool(beta)
    objective, k3s = torch.zeros(2, len(ids), dtype=exact, device=ids.device)
    drift = []
    counts = (weight != 0) | in_kl
    alike = (ids, mask, weight, in_kl) if cap is None else (ids, mask, weight, in_kl, drawn.nan_to_num(1.0))
    first = first_alike(*alike)
    copies = first != torch.arange(len(ids), device=ids.device)
    live = (counts & ~copies).nonzero()[:, 0]
    # transformers checkpoints in training mode only; there is no dropout
    model.train(checkpoints(model))
    made = lots(mask, live, micro_batch, lot_tokens)
    made = [trimmed(ids, mask, rows) for rows in (agree(made, mask) if agree else made)]
    reference = [None] * len(made)
    if beta:
        with torch.no_grad(), knobs.using("base"):  # all of them here: W' is formed once for the base and once back
            reference = [token_logprobs(model, i, m, temperature) for _, i, m in made]
    for (rows, i, m), before in zip(made, reference, strict=True):
        row = m.nonzero()[:, 0]
        by_row = lambda tokens: tokens.new_zeros(len(rows)).index_add(0, row, tokens)  # noqa: B023
        with knobs.row_gradients(len(rows)) as eps:
            logp = token_logprobs(model, i, m, temperature)
            ratio, off = (logp - logp.detach()).exp(), logp.detach() - drawn[rows, : m.shape[1]][m].to(logp)
            if cap is not None:
                ratio = ratio * off.exp().clamp(max=cap).nan_to_num(1.0)
            loss, k3 = -by_row(weight[rows][row].to(logp) * ratio), logp.new_zeros(len(rows))
            if before is not None:
                d = (before - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
                k3 = by_row((d.exp() - d - 1) * in_kl[rows][row])
            whole = (loss + beta * kl_weight * k3).sum().detach()
            if not torch.isfinite(whole):
                raise FloatingPointError(f"the loss is {whole.item()}: non-finite log-probs in {rows.tolist()}")
            loss.sum().backward(retain_graph=before is not None)
            for n, e in eps.items():
                policy[n][rows] = e.grad
            if before is not None:
                (beta * kl_weight * k3.sum()).backward()
                for n, e in eps.items():
                    G[n][rows] = e.grad
        copy, of = ((first[:, None] == rows) & counts[:, None]).nonzero(as_tuple=True)  # the row itself among them
        each = torch.full(m.shape, torch.nan, dtype=exact, device=m.device).masked_scatter(m, logp.detach().to(exact))
        drift.append((each[of] - drawn[copy, : m.shape[1]].to(exact)).flatten())
        objective[rows], k3s[rows] = loss.detach(), k3.detach()
    model.eval()
    for values in (*G.values(), *(policy.values() if beta else ()), objective, k3s):
        values[copies] = values[first[copies]]
    kl = float(k3s.sum()) / max(1, int(mask[in_kl].sum())) if beta else None
    off = torch.cat([objective.new_zeros(0), *drift])
    return RowGrads(G, policy, objective, kl, off[~off.isnan()])


def first_alike(*parts: Tensor) -> Int[Tensor, " b"]:
    """For each row the first one that is equal to it in all parts, (b,) or (b, k): a small policy writes a third of a
    step's texts more than once, and what is computed of one holds for its copies.
    """
    keys = torch.cat([p.reshape(len(p), -1).double() for p in parts], 1)  # exact: token ids and float32 are
    back = torch.unique(keys, dim=0, return_inverse=True)[1]
    row = torch.arange(len(keys), device=keys.device)
    return torch.full_like(row, len(row)).scatter_reduce(0, back, row, "amin")[back]


def trimmed(ids: Int[Tensor, "b s"], mask: Bool[Tensor, "b s-1"], rows: Int[Tensor, " n"]) -> tuple[Tensor, ...]:
    """(rows, their ids, their mask), cut behind the longest of them."""
    m = mask[rows]
    s = int(m.any(0).nonzero().max()) + 2
    return rows, ids[rows, :s], m[:, : s - 1]


def checkpoints(model: nn.Module) -> bool:
    """Whether activations are recomputed in the backward pass, whichever name the installed transformers has for it."""
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")
