"""TRL's GRPOTrainer on the benchmark's prompts, one optimizer step a call (extra ``bench``)."""

import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from projected_grpo.config import Config


class _Clock(TrainerCallback):
    """(CPU seconds, wall seconds) of each optimizer step, sampling and reward included, set-up of train() left out."""

    def __init__(self) -> None:
        self.began = (0.0, 0.0)
        self.taken: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = (time.process_time(), time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.taken.append((time.process_time() - self.began[0], time.perf_counter() - self.began[1]))


class TrlStep:
    """A trainer whose call takes one step on ``prompts`` and returns its (CPU seconds, wall seconds).

    Full fine-tuning with AdamW, sampling by transformers' ``generate``, loss_type dr_grpo, beta 0, float32, no
    gradient checkpointing: the settings of ``cfg``. Every second rollout is rewarded. ``model`` is the caller's own
    copy. Raises ValueError where TRL's tokenizer call would read other prompts.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], cfg: Config, lr: float
    ) -> None:
        texts = [tokenizer.decode(p) for p in prompts]
        if [tokenizer(t)["input_ids"] for t in texts] != [list(p) for p in prompts]:
            raise ValueError("the prompts do not survive decoding: TRL would sample from others")
        self.tokens: list[float] = []

        def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
            self.tokens.append(sum(map(len, completion_ids)) / len(completion_ids))
            return [float(i % 2) for i in range(len(completion_ids))]

        self.folder, self.clock = tempfile.TemporaryDirectory(), _Clock()
        warnings.filterwarnings("ignore", category=FutureWarning)
        args = GRPOConfig(
            output_dir=self.folder.name,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(prompts) * cfg.rl.group,
            num_generations=cfg.rl.group,
            max_completion_length=cfg.rl.max_new,
            temperature=cfg.rl.temperature,
            top_p=cfg.rl.top_p,
            top_k=0,
            loss_type="dr_grpo",
            scale_rewards="none",
            generation_kwargs={"eos_token_id": list(tokenizer.ends)},
            beta=0.0,
            learning_rate=lr,
            max_steps=1,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = GRPOTrainer(
            model=model.requires_grad_(True),
            reward_funcs=rewards,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": t} for t in texts]),
            processing_class=tokenizer,
            callbacks=[self.clock],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.eos_token_ids = list(tokenizer.ends)

    def __call__(self) -> tuple[float, float]:
        self.trainer.train()
        return self.clock.taken[-1]
