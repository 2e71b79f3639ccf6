"""The adapter where no process holds a whole weight: FSDP2 shards W, U and Vh, and the knobs stay whole on each.

    y = x Wᵀ + bias + ((x Vhᵀ) ⊙ (δS + δS_hack + ε_i)) Uᵀ

W' is never formed, so a token costs two more products per Linear than with a merged weight. Gradients are autograd's
own: ∂L/∂ε_i is row i's gradient, as in ``antipasto``.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from projected_grpo.antipasto import AntipastoLinear, Knobs, Use, alike, round_stochastic


class UnmergedLinear(AntipastoLinear):
    """An adapter that adds its low-rank part, of the gains ``acting``, to the output.

    U and Vh are frozen parameters here, since FSDP2 shards parameters and copies buffers.
    """

    def __init__(self, merged: AntipastoLinear) -> None:
        nn.Module.__init__(self)
        self.linear, self.seed = merged.linear, merged.seed
        self.U = nn.Parameter(merged.U, requires_grad=False)
        self.Vh = nn.Parameter(merged.Vh, requires_grad=False)
        self.delta, self.delta_hack = merged.delta, merged.delta_hack
        self.merged: Tensor | None = None
        self.eps: Tensor | None = None
        self.acting: Tensor | None = None
        self.merge("trained")

    def merge(self, use: Use) -> None:
        """Put the knobs in use to work."""
        self.acting = self.gain(use)

    def forward(self, x: Float[Tensor, "b s i"]) -> Float[Tensor, "b s o"]:
        y = self.linear(x)
        gain = self.acting
        if self.eps is not None:
            gain = self.eps[:, None] if gain is None else gain + self.eps[:, None]
        if gain is None:
            return y
        return y + F.linear((F.linear(x, self.Vh) * gain).to(x.dtype), self.U)


def unmerged(model: nn.Module, knobs: Knobs) -> Knobs:
    """Put an ``UnmergedLinear`` with the same knobs in every adapter's place; the knobs of all."""
    modules = {name: UnmergedLinear(m) for name, m in knobs.modules.items()}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return Knobs(modules)


def unsharded(model: nn.Module, knobs: Knobs) -> list[nn.Module]:
    """What FSDP2 must leave whole: the knobs, which our own sums are taken over; and embeddings, final norm and head,
    which ``loss.token_logprobs`` calls in recomputed chunks (FSDP2 takes them for one group that runs once).
    """
    held = nn.ParameterList([*knobs.delta.values(), *knobs.delta_hack.values()])
    return [held, model.get_input_embeddings(), model.get_output_embeddings(), model.get_decoder().norm]


@torch.no_grad()
def merged_parameters(
    model: nn.Module, knobs: Knobs, names: Callable[[str], str] = lambda name: name
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model without adapters whose weights are W' at the trained knobs: what an inference engine
    is to load, under the checkpoint's names (``models.checkpoint_names``). Gathering a sharded tensor is one act of all
    processes, so each of them must iterate to the end.
    """

    def whole(t: Tensor) -> Tensor:
        return t.full_tensor() if isinstance(t, DTensor) else t.data

    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in knobs.modules:  # knobs, U, Vh
            continue
        module = knobs.modules.get(owner.removesuffix(".linear"))
        if module is None:
            yield names(name), whole(parameter)
            continue
        W, gain = whole(parameter), module.gain("trained") if leaf == "weight" else None
        if gain is not None and module.merged is not None and alike(gain, module.acting):
            W = module.merged
        elif gain is not None:
            low_rank = (whole(module.U).to(gain) * gain) @ whole(module.Vh).to(gain)
            W = round_stochastic(W.to(gain) + low_rank, W.dtype, module.seed)
        yield names(f"{owner.removesuffix('.linear')}.{leaf}"), W
