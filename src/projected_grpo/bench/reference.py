"""What the benchmark compares with, written plainly: it is the oracle of the fast path as well.

The hook form is the adapter as first published: y = W x + U((δS + δS_hack) ⊙ (Vh x)) by a forward hook, ordinary
autograd on δS, generation prompt by prompt through the hooks, log-probs from the logits of every position, and two
backwards to tell the student's gradient from the teacher's. Full fine-tuning of the same Linears is the floor under
any adapter's forward and backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from projected_grpo import loss
from projected_grpo.antipasto import AntipastoLinear, Knobs
from projected_grpo.data_types import Sampling


class HookForm:
    """An unwrapped ``model`` with a forward hook on each adapted Linear; ``delta`` (r,) per module is trained.

    The knobs' values are copied at construction. The model is the caller's own copy: the hooks stay on it.
    """

    def __init__(self, model: nn.Module, knobs: Knobs) -> None:
        self.model = model.requires_grad_(False)
        self.delta = {name: nn.Parameter(m.delta.detach().clone()) for name, m in knobs.modules.items()}
        for name, m in knobs.modules.items():
            model.get_submodule(name).register_forward_hook(self._hook(m, self.delta[name]))

    @staticmethod
    def _hook(m: AntipastoLinear, delta: nn.Parameter) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
            return y + ((delta + m.delta_hack) * (inputs[0] @ m.Vh.T)) @ m.U.T

        return add

    def sample(self, prompts: Sequence[Sequence[int]], n: int, how: Sampling) -> list[list[int]]:
        """n completions of each prompt, a call of ``generate`` for each."""
        return [row for p in prompts for row in generate(self.model, [p], n, how)]

    def two_backwards(
        self,
        ids: Int[Tensor, "b s"],
        mask: Bool[Tensor, "b s-1"],
        weight: Float[Tensor, " b"],
        is_student: Bool[Tensor, " b"],
        temperature: float = 1.0,
    ) -> dict[str, Float[Tensor, "2 r"]]:
        """Per module the gradients of L = −Σ_i w_i Σ_t ρ_it over the student's rows and over the teacher's."""
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        row_loss = -(weight[:, None] * (logp - logp.detach()).exp() * mask).sum(1)
        knobs = list(self.delta.values())
        student = torch.autograd.grad(row_loss[is_student].sum(), knobs, retain_graph=True)
        teacher = torch.autograd.grad(row_loss[~is_student].sum(), knobs)
        return {name: torch.stack(both) for name, *both in zip(self.delta, student, teacher, strict=True)}


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], n: int, how: Sampling) -> list[list[int]]:
    """n completions of each prompt in one batch of transformers' ``generate``, from torch's global generator."""
    width = max(map(len, prompts))
    rows = [p for p in prompts for _ in range(n)]
    ids = torch.tensor([[how.pad] * (width - len(p)) + list(p) for p in rows])
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows])
    config = GenerationConfig(
        max_new_tokens=how.max_new, do_sample=True, temperature=how.temperature, top_k=0, top_p=how.top_p,
        eos_token_id=list(how.eos), pad_token_id=how.pad,
    )  # fmt: skip
    with torch.no_grad():
        out = model.generate(ids, attention_mask=attention, generation_config=config)[:, width:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in how.eos), len(row)) for row in out]
    return [row[: end + 1] for row, end in zip(out, ends, strict=True)]


def full_gradient(
    model: nn.Module,
    linears: Sequence[str],
    ids: Int[Tensor, "b s"],
    mask: Bool[Tensor, "b s-1"],
    weight: Float[Tensor, " b"],
    *,
    temperature: float = 1.0,
    micro_batch: int = 64,
) -> dict[str, Float[Tensor, "o i"]]:
    """∂L/∂W of the named Linears by ordinary autograd, on the same rows in the same lots as ``loss.row_gradients``."""
    weights = {name: model.get_parameter(f"{name}.weight").requires_grad_(True) for name in linears}
    for rows in loss.lots(mask, weight.nonzero()[:, 0], micro_batch):
        s = int(mask[rows].any(0).nonzero().max()) + 2
        m = mask[rows][:, : s - 1]
        logp = loss.token_logprobs(model, ids[rows, :s], m, temperature)
        (-(weight[rows][m.nonzero()[:, 0]] * (logp - logp.detach()).exp()).sum()).backward()
    gradients = {}
    for name, w in weights.items():
        gradients[name], w.grad = w.grad, None
        w.requires_grad_(False)
    return gradients
