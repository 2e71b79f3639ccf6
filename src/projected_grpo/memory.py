"""What a run needs of the device's memory, before anything is loaded.

    python -m projected_grpo.memory <preset> [--overrides] [--device-gb=80]

The model's shapes come from its configuration, on PyTorch's meta device, which allocates nothing. What a layer saves
for the backward is counted there too, by running its forward, so that no formula of an architecture has to be kept. The
rest is arithmetic, said line by line in ``plan``.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import sdpa_attention

from projected_grpo import antipasto, loss, models
from projected_grpo.antipasto import AntipastoLinear
from projected_grpo.command_line import parse, run_main
from projected_grpo.config import Config, Positive, UserError

GB = 1e9
COUNTED = 192
"""Tokens of the row whose saved tensors are counted: three chunks of the gated delta rule, so that its matrices, of a
chunk's length (64), are not taken for attention's."""
VLLM = "vLLM: its own weights, cache and activations"
HEADROOM = 0.94
"""Share of the device that a plan may fill: the allocator's blocks and the CUDA context take the rest."""


@dataclass(frozen=True)
class Part:
    """One line of the plan. bytes: what it holds while it is there. knob: the flag that makes it smaller."""

    name: str
    bytes: float
    when: str
    knob: str


@dataclass(frozen=True)
class Plan:
    """The parts that are always there, and those of each phase; the peak is the first and the largest of the others."""

    parts: tuple[Part, ...]

    def of(self, when: str) -> float:
        """Bytes of a phase's parts."""
        return sum(p.bytes for p in self.parts if p.when == when)

    @property
    def phase(self) -> str:
        """The phase that needs most beside what is always there."""
        return max({p.when for p in self.parts} - {"always"}, key=self.of)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return self.of("always") + self.of(self.phase)

    @property
    def knob(self) -> str:
        """The flag that lowers the largest part of the worst moment that a flag can lower."""
        there = [p for p in self.parts if p.when in ("always", self.phase) and p.knob]
        return max(there, key=lambda p: p.bytes).knob

    def table(self) -> str:
        """Printed before anything is loaded; by hand, as a GPU's image may lack what makes tables."""
        rows = [(p.when, p.name, p.bytes / GB, p.knob) for p in self.parts]
        rows.append(("", f"peak, in {self.phase}", self.peak / GB, ""))
        lines = [f"{'when':<15} {'what':<47} {'GB':>8}  lower it by"]
        return "\n".join(
            lines + [f"{when:<15} {what:<47} {gb:>8.3f}  {knob}".rstrip() for when, what, gb, knob in rows]
        )


def skeleton(cfg: Config, config: Any = None) -> nn.Module:
    """The model on the meta device, in its dtype: shapes without memory. Raises UserError where it is not supported."""
    config = models.read_config(cfg.model) if config is None else config
    config = config.get_text_config()
    device = models.device_of(cfg.model)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=models.dtype_of(cfg.model, device))
    except ValueError:
        raise UserError(
            f"the architecture of {cfg.model.model!r}, {config.model_type}, is no causal language model: "
            f"{models.SUPPORTED} supported"
        ) from None
    models.check_architecture(model, cfg.model.model)
    return model.eval().requires_grad_(False)


def put_adapters(model: nn.Module, linears: Mapping[str, nn.Linear], svd_rank: int | None) -> None:
    """``antipasto.wrap`` without bases: what is counted does not depend on their values."""
    for name, linear in linears.items():
        o, i = linear.weight.shape
        r = min(o, i, svd_rank or o)
        adapter = AntipastoLinear(linear, linear.weight.new_empty(o, r), linear.weight.new_empty(r, i), seed=0)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter)
        adapter.eps = adapter.delta.new_zeros(1, r).requires_grad_()


def saved_by_layer(model: nn.Module, tokens: int) -> list[float]:
    """Bytes that each decoder layer saves for the backward of one row of so many tokens, weights not among them.

    Attention matrices (last two dimensions both of the row's length) are left out: sdpa and flash attention recompute
    them, and the meta device has no such kernel.
    """
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    decoder = model.get_decoder()
    h = torch.empty(1, tokens, model.config.hidden_size, dtype=model.dtype, device="meta", requires_grad=True)
    axes = (3,) if hasattr(decoder.rotary_emb, "mrope_section") else ()  # time, height, width, though it is all text
    positions = decoder.rotary_emb(h, torch.empty(*axes, 1, tokens, dtype=torch.long, device="meta"))
    own |= {t.untyped_storage()._cdata for t in positions}

    def counted(layer: nn.Module) -> float:
        saved: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.dim() < 3 or t.shape[-1] != t.shape[-2] or t.shape[-1] != tokens:
                saved.setdefault(t.untyped_storage()._cdata, t)  # kept alive, so that no storage is met twice
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(h, position_embeddings=positions, attention_mask=None)
        return float(sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own))

    return [counted(layer) for layer in decoder.layers]


def layer_kinds(config: Any) -> Sequence[str]:
    """What each layer attends by."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def cache_bytes(config: Any, size: int) -> tuple[float, float]:
    """(bytes a token of the key-value cache, bytes a row of the linear-attention states) over all layers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token, row = 0.0, 0.0
    for kind in layer_kinds(config):
        if kind != "linear_attention":
            token += 2 * config.num_key_value_heads * head * size
            continue
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        row += (2 * keys + values) * config.linear_conv_kernel_dim * size
        row += values * config.linear_key_head_dim * 4  # the state is float32
    return token, row


def repeats(config: Any, attention: str) -> int:
    """How often a turn of sampling, whose rows' mask differs, repeats a layer's keys and values: once for each query
    head that shares them, unless the installed transformers gives a turn's queries to the heads that there are.
    """
    row = torch.empty(1, 1, 1, 1, device="meta")
    grouped = hasattr(sdpa_attention, "pack_gqa") or sdpa_attention.use_gqa_in_sdpa(row, row, row)
    return 1 if attention != "eager" and grouped else config.num_attention_heads // config.num_key_value_heads


def plan(cfg: Config, config: Any = None, total: float | None = None, colocated: bool = False) -> Plan:
    """The parts of a run of ``cfg``; ``config``: a transformers configuration in place of the model's own. total: bytes
    of the device, of which vLLM takes a share; those of this machine when None. colocated: TRL's engine, which holds
    its share while it generates and sleeps otherwise.
    """
    model = skeleton(cfg, config)
    config, size = model.config, model.dtype.itemsize
    linears = antipasto.targets(model, cfg.model.layers)
    most = cfg.model.svd_rank or 1 << 30
    shapes = [(*linear.weight.shape, min(*linear.weight.shape, most)) for linear in linears.values()]
    knobs = sum(r for _, _, r in shapes)
    weights = sum(p.numel() * size for p in model.parameters())
    rows = cfg.rl.prompts_per_step * cfg.rl.group
    length, vocab = cfg.data.max_prompt + cfg.rl.max_new, config.vocab_size
    put_adapters(model, linears, cfg.model.svd_rank)

    # the lot that goes through the model at once: see loss.lots
    in_lot = min(cfg.rl.micro_batch, rows, max(1, (cfg.rl.lot_tokens or loss.LOT_TOKENS) // length))
    tokens = in_lot * length
    by_layer = [b * tokens / COUNTED for b in saved_by_layer(model, COUNTED)]
    layers_in = len(by_layer) * tokens * config.hidden_size * size
    activations = max(by_layer) + layers_in if cfg.model.gradient_checkpointing else sum(by_layer)
    exact = max(size, 4)
    widest = max(max(o, i) for o, i, _ in shapes)
    logits = min(loss.LOGIT_BUDGET, in_lot * cfg.rl.max_new * vocab)

    sampled = min(rows - cfg.rl.prompts_per_step * cfg.n_teacher, cfg.model.sample_rows or rows)
    token, state = cache_bytes(config, size)
    copied = token / max(1, sum(kind != "linear_attention" for kind in layer_kinds(config)))
    copied *= repeats(config, models.attention_of(cfg.model, models.device_of(cfg.model)))
    drawn = 4 + 2 * (cfg.rl.top_p < 1)
    n_prompts = max(1, sampled // max(1, cfg.rl.group - cfg.n_teacher))
    largest = max(o * i for o, i, _ in shapes)
    sampler: tuple[Part, ...] = (
        Part("key-value cache", sampled * (length * (token + copied) + state), "sampling", "--sample-rows"),
        Part("prompts' cache", n_prompts * (cfg.data.max_prompt * token + state), "sampling", "--sample-rows"),
        Part("logits and draws of one token", drawn * sampled * vocab * 4, "sampling", "--sample-rows"),
        Part("reading the prompts", n_prompts * cfg.data.max_prompt * 6 * widest * size, "sampling", "--sample-rows"),
    )
    if cfg.model.sampler == "vllm" or colocated:
        share = cfg.model.vllm_memory * (total or device_bytes(models.device_of(cfg.model)))
        engine = Part(VLLM, share, "TRL's sampling" if colocated else "always", "--vllm-memory")
        sampler = (*sampler, engine) if colocated else (engine,)
    parts = (
        Part("weights", weights, "always", "--model"),
        Part("U and Vh", sum((o + i) * r for o, i, r in shapes) * size, "always", "--svd-rank or --layers"),
        Part("W' (merged weights)", sum(o * i for o, i, _ in shapes) * size, "always", "--layers"),
        Part("δS, δS_hack, AdamW's moments", 8 * knobs * exact, "always", ""),
        *sampler,
        Part("rows' own gradients", 2 * rows * knobs * exact, "training", "--svd-rank or --layers"),
        Part("activations", activations, "training", "--lot-tokens, --max-new"),
        Part("backward's own", tokens * widest * (2 * size + 2 * exact), "training", "--lot-tokens or --max-new"),
        Part("logits chunk", 4 * logits * exact, "training", ""),
        Part("forming one W'", 5 * largest * 4, "merging", ""),
    )
    return Plan(parts)


LOTS = (16384, 8192, 4096)
"""Tokens in a lot that are tried on a GPU, in order; more do not make it busier."""


def with_lots(cfg: Config, config: Any = None, total: float | None = None) -> Config:
    """cfg with ``lot_tokens`` chosen where it is left to us and a GPU does the work: the most of ``LOTS`` whose plan
    fits. config, total: as ``plan`` has them.
    """
    device = models.device_of(cfg.model)
    if cfg.rl.lot_tokens is not None or (device.type != "cuda" and total is None):
        return cfg
    total = total or device_bytes(device)
    tried = (replace(cfg, rl=replace(cfg.rl, lot_tokens=tokens)) for tokens in LOTS)
    return next((c for c in tried if plan(c, config, total).peak <= HEADROOM * total), cfg)


def device_bytes(device: torch.device) -> float:
    """Memory that the device has: of the GPU, or physical memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require(cfg: Config, device_gb: float | None = None, colocated: bool = False) -> Plan:
    """The plan. Raises UserError, naming the flag to lower, when it does not fit."""
    total = device_gb * GB if device_gb else device_bytes(models.device_of(cfg.model))
    made = plan(cfg, total=total, colocated=colocated)
    held = {p.name: p.bytes for p in made.parts}
    if held.get(VLLM, held["weights"]) < held["weights"]:
        raise UserError(
            f"vLLM's {held[VLLM] / GB:.1f} GB do not hold its copy of the weights, {held['weights'] / GB:.1f} GB: "
            "raise --vllm-memory"
        )
    if made.peak > HEADROOM * total:
        raise UserError(
            f"{cfg.model.model} needs {made.peak / GB:.1f} GB in {made.phase} and the device has {total / GB:.1f} GB: "
            f"lower {made.knob} (`python -m projected_grpo.memory {cfg.preset}` shows the plan)"
        )
    return made


@dataclass(frozen=True)
class Asked:
    """What a preset needs of the device's memory, and whether it fits."""

    device_gb: Positive | None = None
    """Memory of the device, where it is not this machine's."""
    run: Config = field(default_factory=Config)


def main(argv: Sequence[str]) -> None:
    """Print a preset's plan, and whether it fits."""
    asked = parse(argv, Asked)
    total = asked.device_gb * GB if asked.device_gb else None
    cfg = with_lots(asked.run, total=total)
    print(plan(cfg, total=total).table())
    require(cfg, asked.device_gb)


if __name__ == "__main__":
    run_main(main)
