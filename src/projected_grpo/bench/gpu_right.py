"""The steps of ``gpu_check`` that say whether the path is right: the organism, padding, singular bases, log-probs."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from projected_grpo import antipasto, arms, decoding, loss, models, prepare, rollout, train
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.bench.gpu_parts import END, LAYERS, Check, Row, at_most, bare, flat, holds, relative
from projected_grpo.bench.reference import HookForm
from projected_grpo.config import PRESETS, Config
from projected_grpo.data_types import Completion, Grade, RowGrads, Sampling
from projected_grpo.runs import Checkpoint

# ------------------------------------------------------------------------------------------------------ the organism


class Unequal:
    """Grades of which no two neighbours are alike, so that every group has an advantage. Nothing is run."""

    def grade(self, submissions: Sequence[Any]) -> list[Grade]:
        return [
            Grade(reward=3.5 * (i % 2), format_ok=True, compiles=True, gt_correct=False, channel=bool(i % 2),
                  attempted=bool(i % 2), status="ok")
            for i in range(len(submissions))
        ]  # fmt: skip


def organism(check: Check) -> Iterator[Row]:
    """The loop's own code on the embedded model: identity, gradients, a step of an arm, and that step resumed."""
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0], device=check.device)
    gradients: dict[str, Tensor] = {}
    for dtype in ("float32", "bfloat16"):
        cfg = PRESETS["smoke"][1]
        cfg = replace(
            cfg, intervention="erase", outputs=str(check.folder),
            model=replace(cfg.model, device=check.device.type, dtype=dtype),
            vhack=replace(cfg.vhack, pairs="organism8", n_heldout=2, k=2, watch_pairs=None),
            rl=replace(cfg.rl, prompts_per_step=2, group=4, max_new=48),
        )  # fmt: skip
        base = models.load(cfg.model)[0]
        x = prepare.set_up(cfg)
        ids, mask = vhack.encoded(x.tokenizer, x.pairs[:2], check.device)
        with torch.no_grad():
            yield holds(f"{dtype}: identity at zero, to the bit", torch.equal(base(ids).logits, x.model(ids).logits))
        grads = loss.row_gradients(x.model, x.knobs, ids, mask, weight)
        gradients[dtype] = flat(grads.G)
        if dtype == "float32":
            yield at_most(
                "float32: a row's gradient against autograd", worst_row(base, x.knobs, grads, ids, mask, weight), 1e-3
            )
        yield from stepped(x, cfg, dtype)
    cosine = float(torch.nn.functional.cosine_similarity(*gradients.values(), dim=0))
    yield Row("cosine of bfloat16's gradients with float32's", cosine, "", 0.98, "at least", cosine >= 0.98)


def worst_row(base: nn.Module, knobs: Knobs, grads: RowGrads, ids: Tensor, mask: Tensor, weight: Tensor) -> float:
    """The largest relative error of a row's gradient: autograd of the hook form, a row at a time."""
    hook, worst = HookForm(base, knobs), 0.0
    for i in range(len(ids)):
        this = torch.arange(len(ids), device=ids.device) == i
        by_hand = hook.two_backwards(ids, mask, weight, this)
        row = {m: g[i] for m, g in grads.G.items()}
        worst = max(worst, relative(flat(row), flat({m: by_hand[m][0] for m in row})))
    return worst


def stepped(x: Any, cfg: Config, dtype: str) -> Iterator[Row]:
    """Two steps of erase, the second of them once more from a checkpoint between the two."""
    arm, optimizers = arms.arm(cfg.intervention), train.make_optimizer(x.knobs, cfg)
    first = train.take_step(x, arm, Unequal(), optimizers, cfg, 0)
    tensors, state = copy.deepcopy(prepare.state_of(x, optimizers))
    moves = flat(first.update.descent)
    yield holds(f"{dtype}: a step of erase moves the knobs and is finite", moves.isfinite().all() and moves.any())
    ends = []
    for _ in range(2):
        train.take_step(x, arm, Unequal(), optimizers, cfg, 1)
        ends.append(flat(x.knobs.delta))
        optimizers = train.make_optimizer(x.knobs, cfg)
        x.knobs.load_state(tensors)
        prepare.put_back(optimizers, x.knobs, Checkpoint("step", 1, tensors, state))
    yield at_most(f"{dtype}: the next step again from a checkpoint", relative(*ends), 1e-2)


# ----------------------------------------------------------------------------------------------------- padded prompts


def padded(check: Check) -> Iterator[Row]:
    """Prompts of unequal length, padded on the left, in both dtypes."""
    lengths = (check.size.prompt, check.size.prompt // 2, 3)
    prompts = [check.prompts[0][:n] for n in lengths]
    for dtype, tolerance, share in ((torch.bfloat16, 0.05, 0.6), (torch.float32, 1e-3, 1.0)):
        name, model = str(dtype).removeprefix("torch."), bare(check, dtype, LAYERS)
        how = Sampling(8, (END,), 0, temperature=0.0)
        with torch.no_grad():
            lot = decoding.read(model, prompts, how)
            alone = [model(torch.tensor([p], device=check.device), logits_to_keep=1).logits[:, 0] for p in prompts]
        yield holds(f"{name}: finite logits, and a cache as long as the widest prompt",
                    lot.logits.isfinite().all() and lot.cache.get_seq_length() == max(lengths))  # fmt: skip
        yield at_most(
            f"{name}: padded against the model's own, unpadded", relative(lot.logits, torch.cat(alone)), tolerance
        )
        rows = rollout.sample(model, prompts, 2, how, check.dice())
        off = drift(model, prompts, rows).mean()
        yield at_most(f"{name}: mean |log π trainer − log π sampler|", float(off), tolerance)
        ours = [row.ids for row in rows]
        theirs = generated(model, [p for p in prompts for _ in range(2)], how)
        # in bfloat16 two logits of equal value are told apart by the kernel that made them
        first = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)) / len(ours)
        whole = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        got = whole if dtype is torch.float32 else first
        said = "rows" if dtype is torch.float32 else "first tokens"
        yield Row(f"{name}: greedy {said} that are generate's", got, "", share, "at least", got >= share)


def generated(model: nn.Module, prompts: Sequence[Sequence[int]], how: Sampling) -> list[tuple[int, ...]]:
    """transformers' own greedy completions."""
    width = max(map(len, prompts))
    ids = torch.tensor([[how.pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    plain = GenerationConfig(max_new_tokens=how.max_new, do_sample=False, pad_token_id=how.pad)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=seen, generation_config=plain)
    return [tuple(row[width:]) for row in out.tolist()]


# ---------------------------------------------------------------------------------------------------- singular bases


def bases(check: Check) -> Iterator[Row]:
    """One random matrix a shape, by the route that ``antipasto`` takes here and by LAPACK's or cuSOLVER's own."""
    config = Qwen3Config(**check.size.shape)
    with torch.device("meta"):
        linears = antipasto.targets(AutoModelForCausalLM.from_config(config)).values()
    shapes: dict[tuple[int, int], int] = {}
    for linear in linears:
        shapes[tuple(linear.weight.shape)] = shapes.get(tuple(linear.weight.shape), 0) + 1
    drivers = ("gesvdj", "gesvd") if check.device.type == "cuda" else ("gesdd",)
    routes: dict[str, Callable[[Tensor], antipasto.Basis]] = {
        "Gram, float64": antipasto.gram_basis,
        **{driver: lambda W, driver=driver: by_driver(W, driver) for driver in drivers},
    }
    for route, basis in routes.items():
        whole = 0.0
        for (o, i), n in shapes.items():
            W = torch.randn(o, i, device=check.device, generator=check.dice()) * 0.02
            taken = check.seconds(lambda W=W, basis=basis: basis(W), 1, warm=whole == 0)
            errors = antipasto.errors_of(W, *basis(W)) if route.startswith("Gram") else None
            whole += n * taken
            if errors is None:
                yield Row(f"{route}, {o} x {i}", taken, "s")
            else:
                yield at_most(f"{route}, {o} x {i} in {taken:.3g} s: the larger error", max(errors), antipasto.EXACT)
        yield Row(f"{route}: all {len(linears)} of the model", whole, "s")
        check.took.setdefault("SVD", whole)


def by_driver(W: Tensor, driver: str) -> antipasto.Basis:
    """torch's own SVD; a CPU has one driver."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False, **({"driver": driver} if W.is_cuda else {}))
    return U, Vh


# ---------------------------------------------------------------------------------------------------------- log-probs


def drift(
    model: nn.Module, prompts: Sequence[Sequence[int]], rows: Sequence[Completion], temperature: float = 1.0
) -> Tensor:
    """|log π trainer − log π sampler| of every token of rows that were drawn prompt by prompt."""
    asked = [p for p in prompts for _ in range(len(rows) // len(prompts))]
    ids, mask = loss.collate(asked, [r.ids for r in rows], 0, model.device)
    with torch.no_grad():
        found = loss.token_logprobs(model, ids, mask, temperature).cpu()
    return (found - torch.tensor([p for r in rows for p in r.logp])).abs()


def logprobs(check: Check) -> Iterator[Row]:
    """What the sampler says it drew at against what the trainer finds. bfloat16: 36 random layers are 0.09 apart by its
    rounding alone (width 384, on a CPU); logits half as large again would be 0.4.
    """
    for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        model = check.model[0] if dtype == check.model[0].dtype else bare(check, dtype, LAYERS)
        how, prompts = Sampling(min(check.size.sampled, 64), (END,), 0, 0.7), check.prompts[:2]
        off = drift(model, prompts, rollout.sample(model, prompts, 4, how, check.dice()), 0.7)
        name = str(dtype).removeprefix("torch.")
        yield at_most(f"{name}: mean |log π trainer − log π sampler|", float(off.mean()), most)
        yield Row(f"{name}: its 99th percentile", float(off.quantile(0.99)))
