"""Load a model and its tokenizer by name: the organism, a local folder, or a hub id."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from projected_grpo.config import ModelCfg, UserError

ORGANISM = Path(str(files("projected_grpo"))) / "organism_files"


def device_of(cfg: ModelCfg) -> torch.device:
    """The device asked for. Raises UserError when it is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: use --device=cpu, or a preset made for the CPU (smoke, organism)")
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def load(cfg: ModelCfg) -> tuple[nn.Module, Any]:
    """The model in evaluation mode on its device, frozen, and its tokenizer with a pad token.

    Raises UserError when the folder is missing or the hub id cannot be had.
    """
    device = device_of(cfg)
    name = str(ORGANISM) if cfg.model == "organism" else cfg.model
    looks_local = name.startswith((".", "/", "~"))
    if looks_local and not (Path(name).expanduser() / "config.json").is_file():
        raise UserError(f"no model in {name}: config.json is missing; give a folder that save_pretrained wrote")
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, cfg.dtype))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot load model {cfg.model!r}: {reason}; give a local folder or log in to the hub"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).eval().requires_grad_(False), tokenizer
