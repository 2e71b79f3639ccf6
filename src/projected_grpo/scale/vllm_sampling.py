"""The sampler that a run asks for: our own, or vLLM in this process, on the GPU of the training model (extra `vllm`).

vLLM holds a copy of the model. Before it samples it is given W' of every adapted Linear whose gains are not those that
it holds; nothing else in the model ever changes. Names are Hugging Face's: vLLM's ``load_weights`` fuses q, k, v and
gate, up itself, and takes any part of a model.

What is said of vLLM here was read in the source of 0.30.0. None of it has been run, for want of a GPU.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from projected_grpo import models, rollout
from projected_grpo.antipasto import Knobs, alike
from projected_grpo.config import Config, UserError
from projected_grpo.data_types import Completion, Sampling

HOTTEST = 2.0
"""vLLM's highest temperature."""
BATCHED_TOKENS = 4096
"""Tokens that the engine reads at once. Its own default is larger, and it sets memory aside for them."""
COMPARED = 4, 32
"""Prompts, and greedy tokens of each, that both samplers write after a push."""
ALIKE = 0.5
"""Share of those that has to agree: rounding parts a row at a tie, now and then; other weights part it at once."""


def refuse(cfg: Config) -> None:
    """What cannot work, said before anything is loaded. Raises UserError."""
    rows = (
        (models.device_of(cfg.model).type != "cuda", "--sampler=vllm needs a CUDA device: use --sampler=own"),
        (find_spec("vllm") is None, "--sampler=vllm needs vLLM: pip install -e '.[vllm]'"),
        (
            models.source_of(cfg.model.model).gguf is not None,
            f"vLLM reads no .gguf file, which --model={cfg.model.model} is: use --sampler=own",
        ),
        (
            not 0 < cfg.model.vllm_memory < 1,
            f"--vllm-memory={cfg.model.vllm_memory:g} is a share of the GPU's memory: between 0 and 1",
        ),
        (
            cfg.rl.temperature > HOTTEST,
            f"vLLM samples at --temperature={HOTTEST:g} at most: lower it, or use --sampler=own",
        ),
    )
    for applies, message in rows:
        if applies:
            raise UserError(message)


def engine(model: nn.Module, cfg: Config) -> Any:
    """vLLM's ``LLM`` with the base weights, from the files that ``model`` was loaded from, in its dtype.

    It runs in this process, where tensors are handed over as they are, and where it schedules the same requests the
    same way. It seeds the process's global generators, which nothing here draws from. Raises UserError.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # vLLM asks the device, not PyTorch, what is free
    logger.info("starting vLLM on {:g} of the GPU's memory", cfg.model.vllm_memory)
    try:
        return LLM(
            model=models.source_of(cfg.model.model).name,
            skip_tokenizer_init=True,
            language_model_only=True,  # a vision tower is neither loaded nor given room
            dtype=str(model.dtype).removeprefix("torch."),
            seed=cfg.seed,
            gpu_memory_utilization=cfg.model.vllm_memory,
            max_model_len=cfg.data.max_prompt + cfg.rl.max_new,
            max_num_batched_tokens=BATCHED_TOKENS,
            logprobs_mode="processed_logprobs",  # of the distribution drawn from: at the temperature, in the nucleus
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"vLLM did not start (see --vllm-memory, or use --sampler=own): {reason}") from error


def load(model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights, under the checkpoint's names, into the engine's model; fused parameters in part."""
    model.load_weights(iter(weights))


class VllmSampler:
    """``rollout.sample`` by vLLM. ``llm``: its ``LLM``; ``held``: the gains (r,) in its copy of each adapted Linear,
    None where that is the base's weight. names: ``models.checkpoint_names``. own: our own
    sampler on the training model, which the engine is held to after every push; None for no such check.

    One request a completion. vLLM draws from the process's global generators, which nothing here draws from, and a call
    seeds them from its generator: its tokens are a function of the weights, the prompts and the generator as far as
    vLLM's kernels are. (A seed of its own for each request would switch its fast sampler off.) What shares a batch
    moves their last bits.
    """

    def __init__(self, llm: Any, knobs: Knobs, names: Callable[[str], str], own: rollout.Sampler | None = None) -> None:
        self.llm, self.knobs, self.names, self.own = llm, knobs, names, own
        self.held: dict[str, Tensor | None] = dict.fromkeys(knobs.modules)

    def push(self) -> list[str]:
        """Give the engine the weights in use where its own were made with other gains; the names of those."""
        moved = {n: m for n, m in self.knobs.modules.items() if not alike(m.acting, self.held[n])}
        if moved:
            weights = [(self.names(f"{name}.weight"), module.in_use.detach()) for name, module in moved.items()]
            self.llm.apply_model(partial(load, weights=weights))
            self.held |= {name: module.acting for name, module in moved.items()}
        return [self.names(f"{name}.weight") for name in moved]

    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int, how: Sampling, generator: torch.Generator
    ) -> list[Completion]:
        """As ``rollout.sample`` returns them. how.pad is not needed: rows do not wait for one another.

        Raises FloatingPointError where a log-prob is no number, and where the engine writes what the model does not.
        """
        if self.push() and self.own is not None:
            self.compare(prompts[: COMPARED[0]], how)
        seed = torch.randint(1 << 62, (), generator=generator, device=generator.device)
        return self.write(prompts, n, how, int(seed))

    def compare(self, prompts: Sequence[Sequence[int]], how: Sampling) -> None:
        """Hold the engine to our own sampler: the share of greedy tokens before a row's first difference."""
        quiet = replace(how, max_new=min(COMPARED[1], how.max_new), temperature=0.0, top_p=1.0)
        ours, theirs = self.own(prompts, 1, quiet, torch.Generator()), self.write(prompts, 1, quiet, 0)
        pairs = [[a == b for a, b in zip(o.ids, t.ids, strict=False)] for o, t in zip(ours, theirs, strict=True)]
        same = sum([*row, False].index(False) for row in pairs) / sum(len(o.ids) for o in ours)
        if same < ALIKE:
            raise FloatingPointError(f"vLLM writes {same:.0%} of our greedy tokens: its weights are not the model's")
        logger.debug("vLLM writes {:.0%} of our greedy tokens", same)

    def write(self, prompts: Sequence[Sequence[int]], n: int, how: Sampling, seed: int) -> list[Completion]:
        """n completions of each prompt by the engine as it is."""
        from vllm import SamplingParams

        # at every call, not only after a push: what an earlier call left there must not move a bit of this one
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not give up its prefix cache, which other weights have made")
        rows = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(n)]
        torch.manual_seed(seed)
        # ignore_eos, as vLLM would also end at whatever the model's generation_config.json names; ours is in the output
        settings = {"max_tokens": how.max_new, "stop_token_ids": list(how.eos), "ignore_eos": True, "detokenize": False}
        settings |= {"temperature": how.temperature, "top_p": how.top_p, "logprobs": 0}  # 0: of the drawn token alone
        asked = SamplingParams(**settings)
        return [completion(o.outputs[0]) for o in self.llm.generate(rows, asked, use_tqdm=False)]


def sampler(model: nn.Module, knobs: Knobs, cfg: Config) -> VllmSampler:
    """An engine beside the model, as a sampler. Raises UserError when it does not start."""
    own = partial(rollout.sample, model, rows=cfg.model.sample_rows)
    return VllmSampler(engine(model, cfg), knobs, models.checkpoint_names(cfg.model), own)


def completion(output: Any) -> Completion:
    """Of vLLM's ``CompletionOutput``: its tokens and the log-prob of each."""
    ids = tuple(output.token_ids)
    logp = tuple(float(at[token].logprob) for token, at in zip(ids, output.logprobs, strict=True))
    if not all(map(math.isfinite, logp)):
        raise FloatingPointError("vLLM drew a token whose log-prob is no number: its weights are damaged")
    return Completion(ids, logp)
