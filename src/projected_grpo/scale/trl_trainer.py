"""The same algorithm inside TRL's GRPOTrainer, on as many processes as ``accelerate launch`` starts (extra ``trl``)."""

import math
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PrinterCallback, TrainerCallback

from projected_grpo import arms, memory, prepare, problems, runs
from projected_grpo.command_line import extra, parse, run_main
from projected_grpo.config import Config, UserError
from projected_grpo.data_types import GradedBatch, Projection, Rollout, Task, Update
from projected_grpo.models import checkpoint_names, device_of
from projected_grpo.prepare import Experiment, refresh_if_due, set_up
from projected_grpo.rewards import Grader
from projected_grpo.rollout import collated, evaluate, tasks_of_step
from projected_grpo.runs import RunRecord, Stopped
from projected_grpo.scale.ranks import Ranks, on
from projected_grpo.scale.sharded import merged_parameters, unmerged, unsharded
from projected_grpo.train import (
    clip_scale,
    deploy_eval,
    make_optimizer,
    meta_of,
    one_step,
    put_gradient,
    record_step,
    say_beginning,
    say_outcome,
    settle,
    update_rule,
)

with extra("trl"):
    from accelerate import PartialState
    from trl import GRPOConfig, GRPOTrainer

Vllm = Literal["off", "colocate", "server"]


def ranks_here(cfg: Config) -> Ranks:
    """This process among those that were launched together."""
    state = PartialState(cpu=device_of(cfg.model).type == "cpu")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return Ranks(state.process_index, state.num_processes, sharded)


def settings(cfg: Config, ranks: Ranks, vllm: str, steps: int, ends: Sequence[int]) -> GRPOConfig:
    """TRL's settings of a run: one generation a step, Dr.GRPO's advantages, no second model, no files of its own. ends:
    the tokens that end a completion, and no others (vLLM would add what the model's generation_config.json names).

    A colocated engine sleeps, and gives its memory back, between generations: training and deploy evaluations follow.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    by_vllm = {"stop_token_ids": list(ends), "ignore_eos": True}
    return GRPOConfig(
        output_dir=tempfile.gettempdir(),
        use_cpu=device_of(cfg.model).type == "cpu",
        bf16=False,
        gradient_checkpointing=False,  # set on the model itself (--gradient-checkpointing)
        per_device_train_batch_size=cfg.rl.prompts_per_step // ranks.n * cfg.rl.group,
        num_generations=cfg.rl.group,
        max_completion_length=cfg.rl.max_new,
        temperature=cfg.rl.temperature,
        top_p=cfg.rl.top_p,
        top_k=0,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,  # the KL is to the free reference, in loss.row_gradients
        learning_rate=cfg.rl.lr,
        max_grad_norm=cfg.rl.clip,
        max_steps=steps,
        seed=cfg.seed,
        shuffle_dataset=False,
        use_vllm=vllm != "off",
        vllm_mode="server" if vllm == "off" else vllm,
        vllm_gpu_memory_utilization=cfg.model.vllm_memory,
        vllm_max_model_length=cfg.data.max_prompt + cfg.rl.max_new,
        vllm_enable_sleep_mode=vllm == "colocate",
        vllm_importance_sampling_correction=False,
        generation_kwargs={"eos_token_id": list(ends)} if vllm == "off" else by_vllm,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def refuse(cfg: Config, ranks: Ranks, vllm: str) -> None:
    """What cannot work, said before anything is loaded. Raises UserError."""
    env, n = os.environ, cfg.rl.prompts_per_step
    rows = (
        (
            env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
            "DeepSpeed steps inside its backward, before a gradient can be projected: launch with DDP or FSDP2",
        ),
        (
            ranks.sharded and env.get("FSDP_VERSION", "1") != "2",
            "FSDP1 flattens the knobs into its shards: set fsdp_version: 2",
        ),
        (
            ranks.n == 1 and "MASTER_ADDR" in env and "WORLD_SIZE" not in env,
            "`accelerate launch --cpu` starts one process whatever --num_processes says: use --config-file with "
            "projected_grpo/scale/launch/cpu.yaml",
        ),
        (n % ranks.n > 0, f"--prompts-per-step={n} must be a multiple of the {ranks.n} processes: groups stay whole"),
        (cfg.model.sampler != "own", "--sampler is the single-process loop's: use --vllm=colocate or --vllm=server"),
        (
            vllm == "off" and cfg.rl.importance_cap is not None,
            "--importance-cap needs the log-probs of what was drawn, which transformers' generate does not keep: use "
            "--vllm=colocate or --vllm=server, or leave it out",
        ),
        (cfg.rl.relearn_steps > 0, "--relearn-steps is the single-process loop's: python -m projected_grpo.train"),
    )
    for applies, message in rows:
        if applies:
            raise UserError(message)


def share_directions(x: Experiment, ranks: Ranks) -> None:
    """Take the first process's V. Every process extracts it (an idle one would only wait), but the last bit of a GPU's
    sum may differ. A gate's own scorer stays local: the flags of a rollout come from the process that holds it.
    """
    V = x.directions
    whole, real, arm, random_V, d = on(ranks.from_first((V.whole, V.real, V.arm, V.random, V.d)), x.knobs.device)
    x.directions = replace(V, whole=whole, real=real, arm=arm, random=random_V, d=d)


class Environment:
    """TRL's reward function: grades what the student wrote in the sandbox; cached rollouts bring their grade along.

    ``rollouts`` holds the last call's, in order, with everything that the log needs.
    """

    __name__ = "environment"

    def __init__(self, grader: Grader) -> None:
        self.grader, self.rollouts, self.seconds = grader, [], 0.0

    def __call__(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        task: Sequence[Task],
        cached: Sequence[Rollout | None],
        **_: Any,
    ) -> list[float]:
        began = time.perf_counter()
        rows = list(zip(task, completions, completion_ids, cached, strict=True))
        grades = iter(self.grader.grade([(t, text) for t, text, _, r in rows if r is None]))
        self.rollouts = [r or Rollout(t, "student", tuple(ids), text, next(grades)) for t, text, ids, r in rows]
        self.seconds = time.perf_counter() - began
        return [r.grade.reward for r in self.rollouts]


class _Stages(TrainerCallback):
    """Passes on the moments at which the trainer acts."""

    def __init__(self, trainer: "ProjectedGRPOTrainer") -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.after_update()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.record()


class ProjectedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose gradient is made rollout by rollout, projected as the arm says, and put on the knobs.

    rec is None on all processes but the first, so that logs are written once. start: the step to begin at. The model
    must be wrapped (``set_up``), and a group's rollouts must be on one process.
    """

    def __init__(
        self, x: Experiment, grader: Grader, rec: RunRecord | None, cfg: Config, ranks: Ranks,
        vllm: str = "off", start: int = 0,
    ) -> None:  # fmt: skip
        refuse(cfg, ranks, vllm)
        if ranks.sharded:
            x.knobs = unmerged(x.model, x.knobs)
        for knob in (*x.knobs.delta.values(), *x.knobs.delta_hack.values()):
            knob.requires_grad_(True)  # else DDP finds nothing to train; no graph ever reaches them
        self.x, self.cfg, self.ranks, self.rec, self.start, self.grader = x, cfg, ranks, rec, start, grader
        self.arm, self.environment = arms.arm(cfg.intervention), Environment(grader)
        self.n_tasks = cfg.rl.prompts_per_step // ranks.n
        self.order = [
            t for s in range(start, cfg.rl.steps) for t in tasks_of_step(x.tasks, s, cfg.rl.prompts_per_step, cfg.seed)
        ]
        super().__init__(
            model=x.model,
            reward_funcs=self.environment,
            args=settings(cfg, ranks, vllm, cfg.rl.steps - start, x.tokenizer.ends),
            train_dataset=Dataset.from_list([{"prompt": t.problem.id, "task": i} for i, t in enumerate(self.order)]),
            processing_class=x.tokenizer,
            callbacks=[_Stages(self)],
        )
        self.remove_callback(PrinterCallback)
        self.eos_token_ids = list(x.tokenizer.ends)  # where TRL cuts what transformers has written
        if vllm != "off":
            names = checkpoint_names(cfg.model)
            self.vllm_generation._iter_named_params = partial(merged_parameters, x.model, x.knobs, names)
        self.processed = vllm != "server" or self.served_processed()
        if ranks.sharded:
            self.accelerator.state.fsdp_plugin.ignored_modules = unsharded(x.model, x.knobs)

    def served_processed(self) -> bool:
        """Whether the server's log-probs are those of the distribution that it draws from. Raises UserError where that
        is needed and not so.
        """
        mode = [None]
        if self.accelerator.is_main_process:
            mode = [self.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]]
        processed = self.ranks.from_first(mode[0]) == "processed_logprobs"
        if self.cfg.rl.importance_cap is not None and not processed:
            raise UserError("--importance-cap needs a server started with --logprobs-mode processed_logprobs")
        return processed

    @property
    def step(self) -> int:
        """The step that is being taken."""
        return self.start + self.state.global_step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer and schedule of the loop, whose groups keep decay away from the quarantine."""
        if self.optimizer is None:
            self.optimizer, self.lr_scheduler = make_optimizer(self.x.knobs, self.cfg)
        return self.optimizer

    def go_on(self, stopped: Stopped) -> None:
        """Put knobs, moments, schedule and directions back to a stopped run's checkpoint."""
        self.create_optimizer()
        optimizers = (self.optimizer, self.lr_scheduler)
        prepare.restore(self.x, optimizers, stopped.at, stopped.folder, self.cfg)
        share_directions(self.x, self.ranks)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Made with the optimizer."""
        return self.lr_scheduler

    # --- rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, told which task a row is and which rows are the teacher's; adds ``row`` and ``is_teacher``, both b."""
        tasks = [self.order[row["task"]] for row in inputs]
        self.tasks, self.cached = tasks, self.teacher_rows(tasks)
        rows = [{"prompt": t.problem.id, "task": t, "cached": r} for t, r in zip(tasks, self.cached, strict=True)]
        output = super()._generate_and_score_completions(rows)
        device = output["advantages"].device
        is_teacher = torch.tensor([r is not None for r in self.cached], device=device)
        return output | {"row": torch.arange(len(rows), device=device), "is_teacher": is_teacher}

    def teacher_rows(self, tasks: Sequence[Task]) -> list[Rollout | None]:
        """The teacher's rollouts, at the end of each group; None where the student is to write."""
        group, n, first = self.cfg.rl.group, self.cfg.n_teacher, self.ranks.rank * self.n_tasks
        rows: list[Rollout | None] = []
        for at, task in enumerate(tasks[::group], start=first):
            dice = random.Random(f"{self.cfg.seed} {self.step} {at}")
            drawn = self.x.teacher.draw(task, n, self.x.tokenizer, dice) if n else []
            rows += [None] * (group - n) + drawn
        return rows

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        """The one prompt encoder of this project."""
        return [problems.encode_prompt(self.x.tokenizer, t) for t in self.tasks], None, {}

    def _generate_single_turn(self, prompt_ids: list, images: Any, multimodal_fields: Any, *_: Any, **__: Any) -> Any:
        """TRL's (transformers or vLLM) for the student's rows; cached ids for the others. TRL is told no log-probs:
        what vLLM drew at goes into the batch, as ``logp`` of a row.

        The generator is a function of (seed, step, process), so that processes write different rollouts.
        """
        began = time.perf_counter()
        written = [list(r.ids) if r else [] for r in self.cached]
        rows = [i for i, r in enumerate(self.cached) if r is None]
        torch.manual_seed(random.Random(f"{self.cfg.seed} {self.step} {self.ranks.rank} trained").getrandbits(63))
        n, chosen = self.cfg.rl.group - self.cfg.n_teacher, [prompt_ids[i] for i in rows]
        found, said = super()._generate_single_turn(chosen, images, multimodal_fields, n)
        self.logp: list[tuple[float, ...] | None] = [None] * len(written)
        for at, (i, ids) in enumerate(zip(rows, found, strict=True)):
            written[i] = ids
            if said is not None and self.processed:
                self.logp[i] = tuple(math.nan if p is None else p for p in said[at])
        self.gen_seconds = time.perf_counter() - began
        return written, None

    def batch(self, inputs: dict[str, Any]) -> GradedBatch:
        """This process's rollouts in the order of their groups (TRL shuffles rows)."""
        back = inputs["row"].argsort()
        seconds = {"gen": self.gen_seconds, "grade": self.environment.seconds}
        rows = [replace(r, logp=p) for r, p in zip(self.environment.rollouts, self.logp, strict=True)]
        made = collated(self.x, rows, seconds)
        return replace(made, is_student=~inputs["is_teacher"][back])

    # --- the step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward that leave the projected gradient of all processes on the knobs. DDP has nothing to
        reduce: no graph reaches a parameter, and the sums are taken in ``train.one_step``.
        """
        step = self.step
        if step and step % self.cfg.eval.eval_every == 0:
            self.deploy(step)
        overlap = refresh_if_due(self.x, self.cfg, step)
        if overlap is not None:
            share_directions(self.x, self.ranks)
        self.model.train()  # so that TRL takes this for training
        roll_out = lambda: self.batch(self._prepare_inputs(inputs))
        made = one_step(self.x, self.arm, roll_out, self.put, self.cfg, step, self.ranks)
        self.made = replace(made, overlap=overlap)
        self.model.train()
        self._step += 1
        return torch.tensor(self.made.loss, device=self.args.device)

    def put(self, p: Projection) -> Update:
        """The gradient on the knobs; TRL steps the optimizer later, and ``after_update`` fills the Update in."""
        self.before = {m: d.detach().clone() for m, d in self.x.knobs.delta.items()}
        put_gradient(self.x.knobs, p)
        return Update({}, 0.0)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        """Clip by the norm before projection, so that arms differ by their projection alone."""
        put_gradient(self.x.knobs, self.made.projection, clip_scale(self.made.projection, self.args.max_grad_norm))
        return self.made.projection.gn

    def after_update(self) -> None:
        """The optimizer has stepped and the schedule has not: act on the update, form every W'."""
        rule = update_rule(self.x, self.arm, self.cfg)
        descent = settle(self.x.knobs, self.made.projection, self.before, rule)
        self.made = replace(self.made, update=Update(descent, self.lr_scheduler.get_last_lr()[0]))

    @torch.no_grad()
    def record(self) -> None:
        """Log the step that the trainer has just counted."""
        self.x.remember(self.made.batch.rollouts)
        if self.rec is not None:
            optimizers = (self.optimizer, self.lr_scheduler)
            record_step(self.x, self.rec, self.cfg, optimizers, self.step - 1, self.made)

    def deploy(self, step: int, scales: Sequence[float] = ()) -> None:
        """The deploy evaluation: on the first process, the others wait. Where they share the weights all of them run it
        (with the same numbers), since each holds a part of every layer.
        """
        x = self.x
        if self.rec is not None:
            deploy_eval(x, self.grader, self.rec, self.cfg, step, scales)
        elif self.ranks.sharded:
            evaluate(x, x.held_out, self.grader, self.cfg, step, scales)
        self.accelerator.wait_for_everyone()


def train(cfg: Config, vllm: str = "off") -> Path | None:
    """One run; its finished folder on the first process, None on the others. Raises UserError."""
    ranks = ranks_here(cfg)
    refuse(cfg, ranks, vllm)
    runs.require_tracker(cfg.tracker)
    stopped = runs.stopped(cfg)
    memory.require(cfg, colocated=vllm == "colocate")
    with PartialState().main_process_first():  # the first fills the caches, the others read them
        x = set_up(cfg)
    share_directions(x, ranks)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = cfg.graders or (max(1, 2 * (os.cpu_count() or 1) // local) if local > 1 else None)
    with Grader(workers, cfg.allow_unsandboxed_grading) as grader:
        trainer = {"trl": version("trl"), "accelerate": version("accelerate")} | asdict(ranks) | {"vllm": vllm}
        meta = meta_of(x, grader, cfg) | {"trainer": trainer}
        with RunRecord(cfg, meta, stopped) if ranks.rank == 0 else nullcontext() as rec:
            if rec is not None:
                say_beginning(x, rec, meta)
            with losing_a_process(rec):
                run(ProjectedGRPOTrainer(x, grader, rec, cfg, ranks, vllm, stopped.at.done if stopped else 0), stopped)
            folder = rec.finish() if rec is not None else None
    if folder is not None:
        say_outcome(folder, cfg)
    return folder


def run(trainer: ProjectedGRPOTrainer, stopped: runs.Stopped | None) -> None:
    """Training between its first and its last evaluation; from a stopped run's checkpoint on where given."""
    trainer.accelerator.wait_for_everyone()  # the first has cut the logs back
    if stopped is None:
        trainer.deploy(0)
    else:
        trainer.go_on(stopped)
    if trainer.start < trainer.cfg.rl.steps:
        trainer.train()
    trainer.deploy(trainer.cfg.rl.steps, trainer.cfg.eval.scales)


@contextmanager
def losing_a_process(rec: RunRecord | None) -> Iterator[None]:
    """Say in one line that another process is gone: gloo and NCCL name a socket, and the launcher sends SIGTERM."""
    left = f": go on from its last checkpoint with --resume={rec.name}" if rec is not None else ""
    lost = UserError(f"another process of the run ended{left}")

    def stop(*_: Any) -> None:
        raise lost

    usual = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise lost from error
        raise
    finally:
        signal.signal(signal.SIGTERM, usual)


@dataclass(frozen=True)
class Launch:
    """One run inside TRL's trainer, on as many processes as `accelerate launch` starts."""

    vllm: Vllm = "off"
    """TRL's own use of vLLM: `off`, `colocate` beside the model, or `server`."""
    run: Config = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """Parse and train."""
    asked = parse(argv, Launch)
    train(asked.run, asked.vllm)


if __name__ == "__main__":
    run_main(main)
