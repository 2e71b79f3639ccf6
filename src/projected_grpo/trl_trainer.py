"""The same algorithm inside TRL's GRPOTrainer, on as many processes as ``accelerate launch`` starts (extra ``trl``).

accelerate launch --config-file CONFIG -m projected_grpo.trl_trainer <preset> [--overrides] [--resume=RUN] [--vllm=...]

TRL samples (transformers or vLLM), calls the environment as its reward function, clips, steps the optimizer and keeps
the loop; tasks, teacher rollouts, gradients by rollout, arms, evaluation and the run's folder are this project's own.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from loguru import logger
from torch import distributed as dist
from tqdm import tqdm

from projected_grpo import extract_vhack_grad as vhack
from projected_grpo import proj, run_record, trackers
from projected_grpo.config import Config, UserError, choose, parse
from projected_grpo.evals import EvalRow
from projected_grpo.metrics import legend, table_cells
from projected_grpo.prepare import set_up
from projected_grpo.results import bluf, json_lines
from projected_grpo.rewards import Grader
from projected_grpo.run_record import RunRecord
from projected_grpo.sandbox_worker import SandboxError
from projected_grpo.train import SHOULD
from projected_grpo.trl_grpo import ProjectedGRPOTrainer, share_directions
from projected_grpo.trl_settings import VLLM, ranks_here, refuse


def train(cfg: Config, vllm: str = "off") -> Path | None:
    """One run; its finished folder on the first process, None on the others. Raises UserError."""
    ranks = ranks_here(cfg)
    refuse(cfg, ranks, vllm)
    trackers.require(cfg.tracker)
    stopped = run_record.stopped(cfg)
    with PartialState().main_process_first():  # the first fills the caches, the others read them
        x = set_up(cfg)
    share_directions(x, ranks)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = cfg.graders or (max(1, 2 * (os.cpu_count() or 1) // local) if local > 1 else None)
    with Grader(workers, cfg.allow_unsandboxed_grading) as grader:
        meta = {
            "layers": grader.layers,
            "oracle": proj.arm(cfg.intervention).oracle,
            "arm": asdict(proj.arm(cfg.intervention)),
            "V": vhack.basis_summary(x.directions.real, cfg),
            "arm_V": vhack.basis_summary(x.directions.arm, cfg),
            "trainer": {"trl": version("trl"), "accelerate": version("accelerate")} | asdict(ranks) | {"vllm": vllm},
        }
        with RunRecord(cfg, meta, stopped) if ranks.rank == 0 else nullcontext() as rec:
            if rec is not None:
                logger.info("run {}: {} processes, {} tasks", rec.name, ranks.n, len(x.tasks))
                tqdm.write("\n".join((SHOULD, legend(), table_cells(None))))
            with losing_a_process(rec):
                run(ProjectedGRPOTrainer(x, grader, rec, cfg, ranks, vllm, stopped.at.done if stopped else 0), stopped)
            folder = rec.finish() if rec is not None else None
    if folder is not None:
        rows = [EvalRow(**row) for row in json_lines(folder / "evals.jsonl")]
        before, after = ([r for r in rows if r.step == at] for at in (0, cfg.rl.steps))
        tqdm.write(bluf(cfg, folder, before, after))
    return folder


def run(trainer: ProjectedGRPOTrainer, stopped: run_record.Stopped | None) -> None:
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


def main(argv: Sequence[str]) -> None:
    """Parse, train, and say in one line what is wrong when the user can mend it."""
    logger.remove()
    level = "INFO" if os.environ.get("RANK", "0") == "0" else "WARNING"
    logger.add(lambda text: tqdm.write(text, end=""), format="{time:HH:mm:ss} {level: <7} {message}", level=level)
    own = [word for word in argv if word.startswith("--vllm=")]
    try:
        vllm = choose("value for --vllm", own[-1].partition("=")[2], VLLM) if own else "off"
        train(parse([word for word in argv if word not in own]), vllm)
    except (UserError, SandboxError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
