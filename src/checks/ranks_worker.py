"""What two processes of ``test_trl`` run: a step of every arm on rollouts that were written down, as DDP and as FSDP2.

Apart from the checks themselves so that the processes import neither pytest nor TRL.
"""

from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from projected_grpo import antipasto, arms, detectors, loss, rollout
from projected_grpo import extract_vhack_grad as vhack
from projected_grpo.config import Config, RLCfg, VHackCfg
from projected_grpo.data_types import Grade, GradedBatch, Problem, Rollout, Step, Task, Wording
from projected_grpo.extract_vhack_grad import HackBasis
from projected_grpo.prepare import Directions, Experiment
from projected_grpo.scale.ranks import Ranks
from projected_grpo.scale.sharded import unmerged, unsharded
from projected_grpo.train import apply_step, make_optimizer, one_step, update_rule

GROUP, PROMPTS = 4, 4
CFG = Config(
    rl=RLCfg(
        prompts_per_step=PROMPTS,
        group=GROUP,
        max_new=8,
        micro_batch=3,
        warmup=0,
        lr=1e-2,
        clip=1e-3,
        importance_cap=1.5,
        mask_truncated=True,
    ),
    vhack=VHackCfg(n_heldout=0),
)
SHARDED_ARMS = ("none", "erase", "route", "gate_drop", "gate_act_punish")
TASK = Task(Problem("p", "f", "", "f", "", "", ()), "sentinel", Wording())


def model_and_knobs(cache: Path) -> tuple[Qwen3ForCausalLM, antipasto.Knobs]:
    """A tiny model in float64 with knobs away from zero, the same on every call."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.float64).eval()
    knobs = antipasto.wrap(model, cache)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in knobs.modules.values():
            for knob in (m.delta, m.delta_hack):
                knob.copy_(0.1 * torch.randn(knob.shape, generator=generator, dtype=torch.float64))
    knobs.merge()
    return model, knobs


def rollouts() -> list[Rollout]:
    """A step's rollouts, of unequal lengths and rewards; the last of each group is a teacher's, one group is flat."""
    dice, rows = torch.Generator().manual_seed(2), []
    for i in range(PROMPTS * GROUP):
        n = int(torch.randint(1, 8, (), generator=dice))
        ids = (*torch.randint(2, 97, (n,), generator=dice).tolist(), 1)
        reward = 0.5 if i // GROUP == 1 else 0.5 * int(torch.randint(0, 8, (), generator=dice))
        grade = Grade(reward, True, True, reward == 3.5, reward in (1.0, 2.0, 3.5), False, "ok")
        rows.append(Rollout(TASK, "teacher" if i % GROUP == GROUP - 1 else "student", ids, "", grade))
    return rows


def batch(rows: list[Rollout], own: slice) -> GradedBatch:
    """The batch of some of the rollouts, whole groups."""
    rows, first = rows[own], own.start // GROUP
    rewards = torch.tensor([r.grade.reward for r in rows], dtype=torch.float64).view(-1, GROUP)
    prompts = [[10 + first + i // GROUP, 20, 21][: 1 + (first + i // GROUP) % 3] for i in range(len(rows))]
    ids, mask = loss.collate(prompts, [r.ids for r in rows], 0, torch.device("cpu"))
    is_student = torch.tensor([r.source == "student" for r in rows])
    written = mask & is_student[:, None]
    drawn = torch.full(mask.shape, torch.nan).masked_fill(written, -5.0)  # weights under the cap and over it
    return GradedBatch(
        ids, mask, rewards.flatten(), is_student, drawn, is_student & (mask.sum(1) == 8), tuple(rows),
        {"gen": 0.0, "grade": 0.0},
    )  # fmt: skip


def directions(model: Qwen3ForCausalLM, knobs: antipasto.Knobs, arm: arms.Arm) -> Directions:
    """Random directions, and a detector that flags about a third of these rollouts."""
    draw = torch.Generator().manual_seed(3)
    V = {m: torch.linalg.qr(torch.randn(d.numel(), 2, generator=draw, dtype=torch.float64))[0].T.contiguous()
         for m, d in knobs.delta.items()}  # fmt: skip
    real = HackBasis(V, {m: torch.ones(2) for m in V}, {})
    used = vhack.random_basis(real, 7) if arm.basis != "hack" else real
    everything = batch(rollouts(), slice(0, PROMPTS * GROUP))
    G = loss.row_gradients(model, knobs, everything.ids, everything.mask, torch.ones(len(everything.rewards))).G
    readings = [detectors.MEAN, detectors.HELD_OUT]
    states = detectors.pooled(model, everything.ids, everything.mask, readings)

    def probe(h: torch.Tensor) -> detectors.Detector:
        w = torch.randn(h.shape[1], generator=draw, dtype=torch.float64)
        return flagging(lambda h: h.to(w) @ w, h)

    def flagging(scorer: detectors.Scorer, evidence) -> detectors.Detector:
        return detectors.Detector(scorer, float(scorer(evidence).sort().values[-7:-5].mean()))

    by_gradient = flagging(lambda N: detectors.row_scores(N, used).sum(0), G)
    gate = by_gradient if arm.score == "gradient" else probe(states[detectors.MEAN])
    d = torch.randn(24, generator=draw, dtype=torch.float64).float()
    return Directions(real, real, used, vhack.random_basis(real, 9), gate, d, probe(states[detectors.HELD_OUT]))


def experiment(cache: Path, arm: arms.Arm) -> Experiment:
    model, knobs = model_and_knobs(cache)
    sample, V = partial(rollout.sample, model), directions(model, knobs, arm)
    return Experiment(model, None, knobs, sample, [], None, [], [], [], None, V, deque())


def taken(x: Experiment, arm: arms.Arm, ranks: Ranks) -> tuple[Step, dict[str, torch.Tensor]]:
    """One step on this process's share of the rollouts: what it made, and the knobs afterwards."""
    per = PROMPTS * GROUP // ranks.n
    apply = lambda p: apply_step(x.knobs, p, make_optimizer(x.knobs, CFG), CFG.rl.clip, update_rule(x, arm, CFG))
    made = one_step(x, arm, lambda: batch(rollouts(), ranks.own(per)), apply, CFG, 0, ranks)
    return made, x.knobs.state()


def alone(cache: Path, name: str) -> tuple[Step, dict[str, torch.Tensor]]:
    """The step of that arm on all rollouts in one process."""
    return taken(experiment(cache, arms.ARMS[name]), arms.ARMS[name], Ranks())


def shard(x: Experiment) -> None:
    """FSDP2 as accelerate lays it over a model, with what must stay whole left out. accelerate 1.15 turns no CPU run
    into an FSDP one (its state does so for GPU types only), hence a call of the function that its ``prepare`` calls.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    x.knobs = unmerged(x.model, x.knobs)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False, ignored_modules=unsharded(x.model, x.knobs),
    )  # fmt: skip
    fsdp2_prepare_model(
        SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=None, parallelism_config=None,
            device=torch.device("cpu"), is_main_process=True, mixed_precision="no",
        ),
        x.model,
    )  # fmt: skip
    x.model(input_ids=torch.tensor([[1]]))  # FSDP2 takes the first module that runs for the root


def process(rank: int, folder: str) -> None:
    """Process ``rank`` of two: every arm, then some of them sharded; what came out is written to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    cache, out = Path(folder) / "cache", {}
    for name, arm in arms.ARMS.items():
        made, state = taken(experiment(cache, arm), arm, Ranks(rank, 2))
        out[name] = (made.factors, made.flagged, made.projection, made.grads, state)
    for name in SHARDED_ARMS:
        x = experiment(cache, arms.ARMS[name])
        shard(x)
        made, state = taken(x, arms.ARMS[name], Ranks(rank, 2, sharded=True))
        share = {n: (type(p).__name__, p.to_local().numel() if hasattr(p, "to_local") else p.numel(), p.numel())
                 for n, p in x.model.named_parameters()}  # fmt: skip
        out[f"sharded {name}"] = (made.factors, made.flagged, made.projection, made.grads, state, share)
    torch.save(out, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
