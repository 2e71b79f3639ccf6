"""The steps of ``gpu_check`` that say what the path costs: the device's rates, the large model, its merge, sampling,
gradients, a step and the cache, and what a step of ``full`` comes to.
"""

import itertools
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from projected_grpo import antipasto, arms, decoding, loss, memory, models, proj, rollout, train
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.antipasto import Knobs
from projected_grpo.bench.gpu_parts import (
    END,
    FULL,
    LAYERS,
    REAL,
    Check,
    Row,
    adapted,
    at_most,
    bare,
    config_of,
    flat,
    holds,
    moved,
    relative,
)
from projected_grpo.config import Config
from projected_grpo.data_types import Factors, GradedBatch, Sampling

# -------------------------------------------------------------------------------------------------------- the device


def device(check: Check) -> Iterator[Row]:
    """Versions, what the card is, and its rates: the roofline of all that follows."""
    name = platform.processor() or platform.machine()
    if check.device.type == "cuda":
        name = torch.cuda.get_device_name()
        yield Row("memory", memory.device_bytes(check.device) / memory.GB, "GB")
    packages = {}
    for package in ("torch", "transformers", "flash_attn"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    said = ", ".join(f"{p} {v}" for p, v in packages.items())
    yield Row(f"{name}; {said}; CUDA {torch.version.cuda}; Python {platform.python_version()}")
    n = check.size.n_gemm
    for dtype, rate in ((torch.bfloat16, "flops"), (torch.float32, "flops32")):
        a, b = (torch.randn(n, n, device=check.device, dtype=dtype, generator=check.dice(i)) for i in (0, 1))
        setattr(check, rate, 2 * n**3 / check.seconds(lambda a=a, b=b: a @ b))
        yield Row(f"matrix product in {dtype}".replace("torch.", ""), getattr(check, rate) / 1e12, "TFLOP/s")
    a, b = (torch.randn(512, 512, device=check.device, generator=check.dice(i)) for i in (2, 3))
    exact = a.double() @ b.double()
    yield at_most("float32 products are float32's (TF32 would be 1e-4)", relative(a @ b, exact), 1e-5)
    yield at_most("bfloat16 products", relative(a.bfloat16() @ b.bfloat16(), exact), 1e-2)
    source = torch.empty(check.size.n_copied, dtype=torch.uint8, device=check.device)
    into = torch.empty_like(source)
    check.bandwidth = 2 * source.numel() / check.seconds(lambda: into.copy_(source))
    yield Row("copy, read and write", check.bandwidth / memory.GB, "GB/s")


# -------------------------------------------------------------------------------------------- the model, its merge


def parts(check: Check, **rl: Any) -> dict[str, float]:
    """Bytes of the plan's parts for the large model."""
    cfg = replace(check.size.cfg, rl=replace(check.size.cfg.rl, **rl))
    planned = memory.plan(cfg, config_of(check.size)).parts
    return {p.name: p.bytes for p in planned}


def built(check: Check) -> Iterator[Row]:
    """The large model with random weights and adapters: its bytes against the plan's."""
    dtype = models.dtype_of(check.size.cfg.model, check.device)
    model = bare(check, dtype)
    check.large = model, adapted(model)
    tensors = {t.data_ptr(): t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()]}
    held, plan = sum(tensors.values()), parts(check)
    planned = plan["weights"] + plan["U and Vh"] + plan["δS, δS_hack, AdamW's moments"] / 4
    if check.device.type == "cuda":
        held = torch.cuda.memory_allocated()
    near = abs(held / planned - 1) < 0.1
    yield Row("weights, U, Vh and knobs", held / memory.GB, "GB", planned / memory.GB, "plan", near)


@torch.no_grad()
def formed(knobs: Knobs) -> None:
    """Every W' once, beside the one that it replaces, as a step does it: with gains that it was not made with."""
    for delta in knobs.delta.values():
        delta.neg_()
    knobs.merge()


def merged(check: Check) -> Iterator[Row]:
    """Every W' formed once."""
    knobs = check.model[1]
    moved(knobs)
    work = sum(2 * m.U.numel() * m.Vh.shape[1] for m in knobs.modules.values())
    peak = check.peak(lambda: formed(knobs))[1]
    taken = check.seconds(lambda: formed(knobs), 1, warm=False)
    yield Row("all W' formed", taken, "s", work / check.flops32, "roofline")
    if peak is not None:
        planned = parts(check)["forming one W'"]
        near = 0.5 * planned < peak < 1.1 * planned  # less than that: none was formed
        yield Row("bytes while they are formed", peak / memory.GB, "GB", planned / memory.GB, "plan", near)
    m = next(iter(knobs.modules.values()))
    W = m.linear.weight
    yield holds("W' of no gain is W, to the bit", torch.equal(antipasto.round_stochastic(W.float(), W.dtype, 0), W))
    yield holds("W' of these gains is not", not torch.equal(m.in_use, W))


# ------------------------------------------------------------------------------------------------------- sampling


def paces(check: Check) -> tuple[decoding.Pace, decoding.Pace]:
    """(turns of changing shapes launched one by one, turns of one shape: as a graph on a GPU)."""
    if check.device.type == "cuda":
        return decoding.LAUNCHED, decoding.GRAPHS
    return decoding.EAGER, replace(decoding.EAGER, static=True)


def sampled(check: Check, context: int, turns: int, pace: decoding.Pace) -> list[Any]:
    """Rows of the large model that take so many turns behind prompts of that length."""
    model, n = check.model[0], 4
    prompts = [(check.prompts[0] * (1 + context // check.size.prompt))[:context]] * n
    how = Sampling(turns + 1, (END,), 0, check.size.cfg.rl.temperature, check.size.cfg.rl.top_p)
    with patch.object(rollout, "pace_of", lambda _: pace):
        return rollout.sample(model, prompts, check.size.rows // n, how, check.dice())


def turn_seconds(check: Check, context: int, pace: decoding.Pace) -> float:
    """Seconds of a turn, by how much longer it takes to take more of them."""
    few, many = (check.seconds(lambda t=t: sampled(check, context, t, pace), 1) for t in check.size.turns)
    return (many - few) / (check.size.turns[1] - check.size.turns[0])


def turn_bytes(check: Check, context: int) -> float:
    """What a turn has to read: every weight once, and the rows' keys and values."""
    model = check.model[0]
    token, state = memory.cache_bytes(model.config, model.dtype.itemsize)
    return sum(p.numel() * p.itemsize for p in model.parameters()) + check.size.rows * (context * token + state)


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "attention": ("aten::_flash", "aten::_efficient", "aten::_scaled_dot", "aten::_cudnn"),
    "copies": ("aten::copy_", "aten::cat", "aten::index"),
    "draws": ("aten::exponential_", "aten::sort", "aten::topk", "aten::_softmax", "aten::argmax", "aten::cumsum"),
}


def profiled(check: Check, context: int, pace: decoding.Pace) -> tuple[float, dict[str, float]]:
    """Operator calls of a turn, and shares of its time by kind."""
    cuda = check.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    n, calls, spent = 4, [], {}
    for turns in (n, 3 * n):
        with profile(activities=activities) as seen:
            sampled(check, context, turns, replace(pace, stride=1))
        events = [e for e in seen.key_averages() if e.key.startswith("aten::")]
        calls.append(sum(e.count for e in events))
        spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    whole = sum(spent.values()) or 1.0
    shares = {k: sum(s for key, s in spent.items() if key.startswith(v)) / whole for k, v in KINDS.items()}
    return (calls[1] - calls[0]) / (2 * n), shares


def decoded(check: Check) -> Iterator[Row]:
    """A token of all rows at several contexts, launched one operator after the other; then real tokens."""
    pace = paces(check)[0]
    for context in check.size.contexts:
        taken = check.turn_s[context] = turn_seconds(check, context, pace)
        least = turn_bytes(check, context) / check.bandwidth
        said = f"a token of {check.size.rows} rows at context {context}"
        yield Row(said, 1e3 * taken, "ms", 1e3 * least, "roofline")
    calls, shares = profiled(check, check.size.contexts[0], pace)
    yield Row("operator calls of that token: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()), calls)
    n = check.size.turns[1]
    rows = sampled(check, check.size.prompt, n, pace)
    drawn = torch.tensor([r.logp for r in rows])
    yield holds(f"{n + 1} tokens of {len(rows)} rows: all drawn, of finite log-prob",
                drawn.shape == (check.size.rows, n + 1) and drawn.isfinite().all())  # fmt: skip


def graphed(check: Check) -> Iterator[Row]:
    """The same as one launch a token, and that both draw the same tokens from the same dice."""
    launched, fixed = paces(check)
    small = bare(check, torch.float32, LAYERS)
    prompts, how = [p[:n] for p, n in zip(check.prompts, (7, check.size.prompt), strict=False)], Sampling(20, (END,), 0)
    both = []
    for pace in (launched, fixed):
        with patch.object(rollout, "pace_of", lambda _, pace=pace: pace):
            both.append([r.ids for r in rollout.sample(small, prompts, 3, how, check.dice())])
    same = sum(a == b for a, b in zip(*both, strict=True)) / len(both[0])
    # a rounding in another kernel may turn one token, and with it the rest of its row
    yield Row("float32: rows that both paces draw alike", same, "", 0.8, "at least", same >= 0.8)
    for context in check.size.contexts:
        taken = turn_seconds(check, context, fixed)
        least = turn_bytes(check, context) / check.bandwidth
        gain = check.turn_s.get(context, float("nan")) / taken
        said = f"a token at context {context}, {gain:.2f} x as fast"
        yield Row(said, 1e3 * taken, "ms", 1e3 * least, "roofline")
        check.turn_s[context] = taken if decoding.pace_of(check.model[0]) is fixed else check.turn_s[context]


# ------------------------------------------------------------------------------------------------- the gradient


def batch(check: Check, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and weights of rows that all have that length."""
    ids = torch.randint(5, check.size.shape["vocab_size"], (rows, length), device=check.device, generator=check.dice())
    mask = torch.arange(1, length, device=check.device).expand(rows, -1) >= min(check.size.prompt, length // 2)
    return ids, mask, torch.linspace(-1, 1, rows, device=check.device)


def work_of(model: nn.Module, knobs: Knobs, mask: Tensor, beta: float, again: bool) -> float:
    """FLOP of ``row_gradients``: 2 a weight and token forward and 2 backward to the inputs (frozen weights get none),
    Uᵀ dy and Vh x, the head on completion tokens; with β a forward of the reference and a backward of its own. Each
    backward runs forward once more what is recomputed: layers where ``again`` says so, the head where its logits are
    too many to be held.
    """
    weight = model.get_output_embeddings().weight
    layers = 2 * mask.numel() * sum(m.linear.weight.numel() for m in knobs.modules.values())
    inside = 2 * mask.numel() * sum(m.U.numel() + m.Vh.numel() for m in knobs.modules.values())
    head, chunked = 2 * int(mask.sum()) * weight.numel(), int(mask[0].sum()) > loss.LOGIT_BUDGET // len(weight)
    return (1 + bool(beta)) * ((2 + again) * layers + (2 + chunked) * head + inside)


def planned_training(check: Check, rows: int, tokens: int, again: bool) -> float:
    """Bytes of the plan's training phase for rows of the size's length."""
    cfg, size = check.size.cfg, check.size
    cfg = replace(
        cfg, model=replace(cfg.model, gradient_checkpointing=again), data=replace(cfg.data, max_prompt=size.prompt),
        rl=replace(cfg.rl, max_new=size.length - size.prompt, prompts_per_step=1, group=rows, micro_batch=rows,
                   lot_tokens=tokens),
    )  # fmt: skip
    return memory.plan(cfg, config_of(size)).of("training")


def preset(check: Check) -> Config:
    """The size's own, its lots as the plan chooses them for the device; for one of 80 GB where that is a CPU."""
    total = memory.device_bytes(check.device) if check.device.type == "cuda" else 80 * memory.GB
    return memory.with_lots(check.size.cfg, config_of(check.size), total)


@dataclass(frozen=True)
class Setting:
    """Of ``row_gradients``: whether activations are recomputed, β, tokens of a lot, rows."""

    again: bool
    beta: float
    tokens: int
    rows: int = 4

    def __str__(self) -> str:
        return f"beta {self.beta:g}, lots of {self.tokens}, {self.rows} rows, recomputed {self.again}"


def settings(check: Check) -> list[Setting]:
    """What gradients are timed at: first the preset's own, with as many rows as fill a lot."""
    cfg, size = preset(check), check.size
    tokens = cfg.rl.lot_tokens or loss.LOT_TOKENS
    rows = max(1, min(cfg.rl.micro_batch, tokens // size.length))
    own = Setting(cfg.model.gradient_checkpointing, cfg.rl.beta, tokens, rows)
    return [own, *(Setting(*x) for x in itertools.product((True, False), (0.0, cfg.rl.beta), size.lots))]


def gradient(check: Check) -> Iterator[Row]:
    """Every row's gradient at the sizes of a step, and what bfloat16 does to it."""
    model, knobs = check.model
    size, (own, *others) = check.size, settings(check)
    for x in (own, *others):
        ids, mask, weight = batch(check, x.rows, size.length)
        models.recompute(model, x.again)
        call = lambda x=x, ids=ids, mask=mask, weight=weight: loss.row_gradients(
            model, knobs, ids, mask, weight, beta=x.beta, kl_weight=1.0, micro_batch=x.rows, lot_tokens=x.tokens
        )  # fmt: skip
        said = f"{x}{', as `full` has them' if x is own else ''}"
        try:
            call()
            taken, peak = check.peak(call)
        except torch.OutOfMemoryError:
            yield Row(f"{said}: out of memory", ok=not x.again)
            continue
        work = work_of(model, knobs, mask, x.beta, x.again)
        yield Row(said, work / taken / 1e12, "TFLOP/s", check.flops / 1e12, "roofline")
        if peak is not None:
            planned = planned_training(check, x.rows, x.tokens, x.again)
            yield Row(f"{said}: bytes", peak / memory.GB, "GB", planned / memory.GB, "plan", peak < 1.1 * planned)
        if x is own:
            check.took["tokens/s"] = ids.numel() / taken
    models.recompute(model, size.cfg.model.gradient_checkpointing)
    few, (ids, mask, weight) = {}, batch(check, 2, size.length)
    for dtype in (torch.float32, torch.bfloat16):
        small = bare(check, torch.float32, LAYERS).to(dtype)
        grads = loss.row_gradients(small, adapted(small), ids, mask, weight)
        few[dtype] = flat(grads.G)
    cosine = float(torch.nn.functional.cosine_similarity(*few.values(), dim=0))
    yield Row(
        f"cosine of bfloat16's gradient with float32's, {LAYERS} layers", cosine, "", 0.98, "at least", cosine >= 0.98
    )


# ---------------------------------------------------------------------------------------------- a step, the room


def whole_step(check: Check) -> Iterator[Row]:
    """A step of the full shape but for its length, its rewards forced to differ, with the arms erase and route."""
    model, knobs = check.model
    cfg = preset(check)
    cfg = replace(cfg, rl=replace(cfg.rl, max_new=check.size.sampled))
    n, device = cfg.rl.prompts_per_step * cfg.rl.group, check.device
    ones = {m: torch.ones(cfg.vhack.k, x.delta.numel(), device=device) for m, x in knobs.modules.items()}
    V = vhack.random_basis(vhack.HackBasis(ones, {m: v[:, 0] for m, v in ones.items()}, {}), 0)
    how = Sampling(cfg.rl.max_new, (END,), 0, cfg.rl.temperature, cfg.rl.top_p)
    clock = [check.synchronized()]
    rows = rollout.sample(model, check.prompts, cfg.rl.group, how, check.dice(), cfg.model.sample_rows)
    clock.append(check.synchronized())
    prompts = [p for p in check.prompts for _ in range(cfg.rl.group)]
    ids, mask = loss.collate(prompts, [r.ids for r in rows], 0, device)
    drawn = torch.full(mask.shape, torch.nan, device=device)
    drawn[mask] = torch.tensor([p for r in rows for p in r.logp], device=device)
    rewards = torch.arange(n, device=device) % 2 * 3.5
    yes = torch.ones(n, dtype=torch.bool, device=device)
    A = arms.advantages(rewards.view(-1, cfg.rl.group)).flatten()
    grads = train.sample_grads(model, knobs, GradedBatch(ids, mask, rewards, yes, drawn, ~yes, (), {}), A, cfg)
    clock.append(check.synchronized())
    yield Row("sampling", clock[1] - clock[0], "s")
    yield Row("gradients", clock[2] - clock[1], "s")
    for arm in ("erase", "route"):
        began = check.synchronized()
        p = proj.decided(proj.sums(grads.G, Factors.plain(n), yes), V, V, arms.ARMS[arm], cfg.vhack)
        decided = check.synchronized()
        update = train.apply_step(knobs, p, train.make_optimizer(knobs, cfg), cfg.rl.clip)
        check.took |= {"project": decided - began, "update": check.synchronized() - decided}
        moves, quarantine = flat(update.descent), flat(knobs.delta_hack)
        yield holds(f"{arm}: finite, moves the knobs{' and the quarantine' if arm == 'route' else ' alone'}",
                    moves.isfinite().all() and moves.any() and bool(quarantine.any()) == (arm == "route"))  # fmt: skip
        yield Row(f"{arm}: project", check.took["project"], "s")
        yield Row(f"{arm}: update, merge", check.took["update"], "s")


def cached(check: Check) -> Iterator[Row]:
    """The cache of more and more rows at the full length, until it no longer fits, and what the plan says of each."""
    model = check.model[0]
    layers, length = model.config.num_hidden_layers, check.size.cfg.data.max_prompt + check.size.cfg.rl.max_new
    shape = (model.config.num_key_value_heads, length, model.config.head_dim)
    for rows in check.size.cached:
        cfg = replace(check.size.cfg, model=replace(check.size.cfg.model, sample_rows=rows))
        made = memory.plan(cfg, config_of(check.size))
        planned = next(p.bytes for p in made.parts if p.name == "key-value cache")
        try:
            room = [torch.zeros(rows, *shape, dtype=model.dtype, device=check.device) for _ in range(2 * layers)]
            held, fits = float(sum(t.numel() * t.itemsize for t in room)), True
        except torch.OutOfMemoryError:
            held, fits = None, False
        room = []
        told = made.peak < memory.HEADROOM * memory.device_bytes(check.device)
        said = "fits" if fits else "does not fit"
        yield Row(f"cache of {rows} rows {said}", None if held is None else held / memory.GB, "GB", planned / memory.GB,
                  "plan", fits or not told)  # fmt: skip
        if not fits:
            return


# ---------------------------------------------------------------------------------------------------------- the whole


def full_step(check: Check) -> str:
    """Seconds of a step of the size's preset by stage, extrapolated from what was timed."""
    rl, took = check.size.cfg.rl, check.took
    n, lots = rl.prompts_per_step * rl.group, rl.prompts_per_step * rl.group / check.size.rows
    at = check.size.prompt + rl.max_new / 2
    try:
        near = sorted(check.turn_s, key=lambda c: abs(c - at))[:2]
        (a, b), (ta, tb) = near, [check.turn_s[c] for c in near]
        turn = ta + (tb - ta) * (at - a) / (b - a)  # a turn's time is linear in its context
        stages = {
            "sampling": lots * rl.max_new * turn,
            "gradients": n * (check.size.prompt + rl.max_new) / took["tokens/s"],
            "projection": took["project"],
            "update and merge": took["update"],
        }
    except (KeyError, ValueError):
        return "a step of `full`: not to be said, since a step that it is extrapolated from failed"
    whole = sum(stages.values())
    said = ", ".join(f"{name} {s:.3g}" for name, s in stages.items())
    shape = "" if check.size is REAL else " (tiny shapes)"
    return (
        f"a step of `full`{shape}, every row {rl.max_new} tokens long: {whole:.3g} s ({said}; grading not among them); "
        f"{FULL.rl.steps} steps: {FULL.rl.steps * whole / 3600:.3g} h"
    )
