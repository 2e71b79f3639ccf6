"""What the processes of a distributed run tell each other: vectors over rollouts, and sums over knobs. Nothing else.

Gradients of weights never travel, since weights are frozen. A process keeps its own rollouts' token ids and gradients;
what a rule must see of all rollouts (rewards, advantages, flags) is gathered, and what a projection reads of their
gradients is linear in the rows, so four sums over all knobs are added up (``proj.sums``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from projected_grpo.data_types import GradedBatch, RowGrads
from projected_grpo.train import Alone


@dataclass(frozen=True)
class Ranks(Alone):
    """This process among ``n`` like it, each with equally many rollouts. sharded: they also share the weights (FSDP2),
    so that they must run forward and backward in step. With n = 1 every method returns what it is given.
    """

    rank: int = 0
    n: int = 1
    sharded: bool = False

    def own(self, b: int) -> slice:
        """This process's rows among those of all, where each has b."""
        return slice(self.rank * b, (self.rank + 1) * b)

    def rows(self, values: Tensor, dim: int = 0) -> Tensor:
        """The values of all processes, side by side along ``dim`` in the order of ranks."""
        if self.n == 1:
            return values
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.n)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim)

    def objects(self, values: Sequence[Any]) -> list[Any]:
        """The lists of all processes, end to end."""
        if self.n == 1:
            return list(values)
        parts: list[Any] = [None] * self.n
        dist.all_gather_object(parts, list(values))  # plain values, no tensor that sits on a device
        return [value for part in parts for value in part]

    def from_first(self, value: Any) -> Any:
        """The first process's value (pickled): what was computed from equal inputs may differ in its last bit from
        device to device, and the knobs must not. Its tensors arrive on the CPU: one pickled on a GPU would be unpickled
        on the first process's.
        """
        if self.n == 1:
            return value
        box = [on(value, torch.device("cpu"))]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, sums: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Sums over all processes, in one message."""
        if self.n == 1:
            return sums
        flat = torch.cat([t.reshape(-1) for by_module in sums.values() for t in by_module.values()])
        dist.all_reduce(flat)
        parts = iter(flat.split([t.numel() for by_module in sums.values() for t in by_module.values()]))
        return {name: {m: next(parts).view_as(t) for m, t in by_module.items()} for name, by_module in sums.items()}

    def whole(self, batch: GradedBatch) -> GradedBatch:
        """The rollouts of all processes. Token ids and masks stay where they are: those of the result are empty."""
        if self.n == 1:
            return batch
        b = len(batch.rewards) * self.n
        seconds = self.rows(torch.tensor([list(batch.seconds.values())], device=batch.rewards.device))
        return replace(
            batch,
            ids=batch.ids.new_zeros(b, 1),
            mask=batch.mask.new_zeros(b, 0),
            rewards=self.rows(batch.rewards),
            is_student=self.rows(batch.is_student),
            drawn=batch.drawn.new_zeros(b, 0),
            truncated=self.rows(batch.truncated),
            rollouts=tuple(self.objects(batch.rollouts)),
            seconds=dict(zip(batch.seconds, seconds.amax(0).tolist(), strict=True)),
        )

    def summary(self, grads: RowGrads, n_tokens: int) -> RowGrads:
        """Objective, KL and drift over all processes; the rows' gradients are left out."""
        if self.n == 1:
            return grads
        k3 = 0.0 if grads.kl is None else grads.kl * n_tokens
        parts = torch.tensor([[k3, float(n_tokens)]], dtype=torch.float64, device=grads.objective.device)
        k3, tokens = self.rows(parts).sum(0).tolist()
        drift = torch.cat(self.objects([grads.drift.cpu()]))
        kl = None if grads.kl is None else k3 / max(1, tokens)
        return RowGrads({}, {}, self.rows(grads.objective), kl, drift)

    def agree(self, lots: list[Tensor], mask: Tensor) -> list[Tensor]:
        """The lots of this process's rows, divided so that every process has as many: gathering shared weights is one
        act of all, and a process that ran one forward fewer would leave the others waiting.
        """
        if not self.sharded or self.n == 1:
            return lots
        n = self.rows(torch.tensor([len(lots)], device=mask.device))
        return evened(lots, len(mask), int(n.max()), mask.device)


def on(value: Any, device: torch.device) -> Any:
    """The value with every tensor in it, in dicts, tuples and dataclasses, on that device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: on(v, device) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(on(v, device) for v in value)
    if is_dataclass(value):
        return replace(value, **{f.name: on(getattr(value, f.name), device) for f in fields(value)})
    return value


def evened(lots: Sequence[Tensor], b: int, n: int, device: torch.device) -> list[Tensor]:
    """n lots of the b rows that cover what ``lots`` cover: rows that were in none join first, each as a lot (their
    weight is 0, and so is their gradient), then the largest are halved. Raises ValueError where n exceeds b.
    """
    if n > b:
        raise ValueError(f"{b} rows cannot be divided into {n} lots")
    made, taken = list(lots), {int(i) for lot in lots for i in lot}
    spare = [i for i in range(b) if i not in taken]
    made += [torch.tensor([i], device=device) for i in spare[: max(0, n - len(made))]]
    while len(made) < n:
        largest = max(range(len(made)), key=lambda i: len(made[i]))
        made[largest : largest + 1] = made[largest].tensor_split(2)
    return made
