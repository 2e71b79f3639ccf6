"""How a run is put to TRL and accelerate, and what is refused there."""

import os
import tempfile
import warnings

from accelerate import PartialState
from trl import GRPOConfig

from projected_grpo import proj
from projected_grpo.config import Config, UserError
from projected_grpo.models import device_of
from projected_grpo.ranks import Ranks
from projected_grpo.step import n_ablated

VLLM = ("off", "colocate", "server")


def ranks_here(cfg: Config) -> Ranks:
    """This process among those that were launched together."""
    state = PartialState(cpu=device_of(cfg.model).type == "cpu")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return Ranks(state.process_index, state.num_processes, sharded)


def settings(cfg: Config, ranks: Ranks, vllm: str, steps: int) -> GRPOConfig:
    """TRL's settings of a run: one generation a step, Dr.GRPO's advantages, no second model, no files of its own."""
    warnings.filterwarnings("ignore", category=FutureWarning)
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
        vllm_importance_sampling_correction=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def refuse(cfg: Config, ranks: Ranks, vllm: str) -> None:
    """What cannot work, said before anything is loaded. Raises UserError."""
    env, n = os.environ, cfg.rl.prompts_per_step
    ablates = n_ablated(proj.arm(cfg.intervention), n, cfg) > 0
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
            "projected_grpo/launch/cpu.yaml",
        ),
        (n % ranks.n > 0, f"--prompts-per-step={n} must be a multiple of the {ranks.n} processes: groups stay whole"),
        (cfg.model.sampler != "own", "--sampler is the single-process loop's: use --vllm=colocate or --vllm=server"),
        (cfg.rl.relearn_steps > 0, "--relearn-steps is the single-process loop's: python -m projected_grpo.train"),
        (
            ablates and (vllm != "off" or ranks.sharded),
            f"{cfg.intervention} samples some prompts with the quarantine ablated, which vLLM and FSDP2 cannot: "
            "set --ablated-share=0",
        ),
    )
    for applies, message in rows:
        if applies:
            raise UserError(message)
