"""Every setting of a run, with its default and its range, and ``PRESETS``: one row a preset, differences only.

Field names are unique over all groups, so that each is one flat flag: ``train.py organism --lr=5e-3 --k=3``.
The docstring under a field is its ``--help``. What ``command_line.parse`` returns lies within every range.
"""

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from projected_grpo.data_types import Mode

Gate = Literal["one_sided", "no_gate", "reverse", "unsigned"]


@dataclass(frozen=True)
class In:
    """The interval that a number has to lie in, as mathematics writes it: ``In("(0, 1]")`` is over 0 and at most 1."""

    interval: str

    def holds(self, x: float) -> bool:
        """Whether x lies in it; NaN lies in none."""
        low, high = map(float, self.interval[1:-1].split(","))
        above = low < x if self.interval[0] == "(" else low <= x
        return above and (x < high if self.interval[-1] == ")" else x <= high)

    def __str__(self) -> str:
        low, high = self.interval[1:-1].split(",")
        if low == "-inf":
            return "a finite number"
        least = f"{'over' if self.interval[0] == '(' else 'at least'} {low}"
        return least if "inf" in high else f"in {self.interval}"


Natural = Annotated[int, In("[0, inf)")]
Count = Annotated[int, In("[1, inf)")]
Share = Annotated[float, In("[0, 1]")]
Positive = Annotated[float, In("(0, inf)")]
NotNegative = Annotated[float, In("[0, inf)")]
Finite = Annotated[float, In("(-inf, inf)")]


@dataclass(frozen=True)
class ModelCfg:
    """The model and where its adapter sits."""

    model: str = "organism"
    """`organism` (the embedded tiny model), `smol` (SmolLM2-135M from its package), a local folder, a .gguf file, or a
    hub id such as Qwen/Qwen3-4B."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Dtype of the weights; auto: bfloat16 on a GPU, float32 elsewhere. The trained knobs are float32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto: flash attention for 16-bit weights on a GPU where it is installed, else PyTorch's sdpa."""
    layers: tuple[Share, Share] = (0.0, 1.0)
    """Depth window, as fractions of the number of layers, whose Linears get an adapter (Wu & Tang: 0.6 0.75)."""
    svd_rank: Count | None = None
    """Train only the top m singular axes of each Linear; all of them when unset."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sampler: Literal["own", "vllm"] = "own"
    """own: the batched sampler here; vllm: vLLM beside the model on the same GPU, given W' (extra `vllm`)."""
    sample_rows: Count | None = None
    """Rows sampled at once, all of a step's when unset; one that has ended makes room for a waiting one. Lower it where
    the key-value cache does not fit. Of no meaning to vLLM, which schedules rows itself."""
    vllm_memory: Annotated[float, In("(0, 1)")] = 0.3
    """Share of the GPU's whole memory that vLLM takes for its own copy of the weights and its cache."""


@dataclass(frozen=True)
class DataCfg:
    """The problems and how they are posed."""

    problems: str = "generated"
    """`generated` (the organism's world), `functions` (the same posed as plain functions, for a chat model), or a
    problem file (JSON lines, ours or rl-rewardhacking's)."""
    eval_problems: str | None = None
    """Held-out problem file for the deploy evaluation; needed with a problem file (the others have their own split)."""
    modes: tuple[Mode, ...] = ("run_tests", "sentinel", "stdout_marker", "file_marker")
    """The loopholes over which the problems are partitioned."""
    eval_modes: tuple[Mode, ...] | None = None
    """The loopholes of the held-out problems; those that are trained on when unset."""
    wording: Literal["default", "train", "heldout"] = "default"
    """Which family of words the hints name."""
    max_prompt: Count = 256
    """Tasks with a longer prompt (tokens) are left out, and counted."""


@dataclass(frozen=True)
class PoolCfg:
    """Teacher rollouts mixed into each group."""

    pool: str | None = None
    """Folder of a teacher pool (`just build-pool`); needed when mix_ratio > 0."""
    mix_ratio: Annotated[float, In("[0, 1)")] = 0.0
    """Share of each group that is teacher rollouts (0.125 of 8 is one)."""


@dataclass(frozen=True)
class VHackCfg:
    """How the hack direction V is extracted and used."""

    pairs: str = "planned64"
    """A name in pairs.PAIRSETS, or `pool`: pairs from the teacher pool, where the known modes' detector fires."""
    known_modes: tuple[Mode, ...] | None = None
    """Modes that the weak detector knows: pairs of other modes are left out. All modes when unset."""
    k: Count = 5
    """Directions extracted for each Linear."""
    k_use: Count | None = None
    """Directions used, sliced at load; all k when unset."""
    tau_axis: Share = 0.0
    """Axes with S_i / S_0 under this are zeroed."""
    drop_bottom_frac: Annotated[float, In("[0, 1)")] = 0.25
    """Global noise floor: axes whose S lies under this quantile of all modules' S are dropped."""
    n_heldout: Natural = 8
    """The last n pairs never fit V; V is judged on them."""
    length_norm: Literal["live", "mean"] = "live"
    """live: the loss's fixed denominator; mean: each completion by its own length."""
    pair_norm: Literal["none", "unit"] = "unit"
    """unit: each side's gradient scaled to norm 1 before hack minus clean is taken; none: as it is."""
    refresh_every: Natural = 10
    """Extract V again every n steps, quarantine ablated; 0 keeps the first."""
    gate: Gate = "one_sided"
    """one_sided removes only hack-ward parts, no_gate both signs, reverse mirrors; unsigned steps against the hack by
    half the part's size, whatever its sign: what one_sided does on the average of pure noise."""
    overshoot: NotNegative = 1.0
    """Factor on what is removed."""
    preserve_magnitude: bool = False
    """Rescale what is kept of each module's gradient to the norm of the whole of it."""
    project: Literal["grad", "update"] = "grad"
    """What an arm's act is done on: the gradient, or the optimizer's update, which AdamW has rescaled."""
    threshold_sd: Finite = 1.5
    """A gate flags a score over the clean sides' mean + this many standard deviations."""
    calibration: Literal["crossfit", "insample"] = "crossfit"
    """Where a gate's threshold comes from: clean sides scored by a direction fitted without them, or by the gate's."""
    shrinkage: Share = 0.5
    """Probes: share of the covariance that is replaced by a multiple of the identity, 0 to 1."""
    watch_pairs: str | None = "watch32"
    """Pair set of the held-out probe, which only looks: it is logged beside the arm's detector, and nothing is ever
    trained against it. None: no such probe."""
    refresh_pairs: Literal["same", "student", "both"] = "same"
    """What a refresh extracts V from: the same pairs, pairs that the known modes' detector finds in the student's
    recent rollouts, or both. The last two need --known-modes, some and not all."""


@dataclass(frozen=True)
class ArmCfg:
    """Doses of single arms."""

    alpha: NotNegative = 2.0
    """rebound: strength."""
    monitor_accuracy: Share = 1.0
    """penalty, screening (ORACLE): how often the monitor is right."""
    penalty: NotNegative = 3.0
    """penalty: reward taken off what the monitor flags; 3 at a perfect monitor is what honest pays, to the bit."""


@dataclass(frozen=True)
class RLCfg:
    """Dr.GRPO."""

    steps: Count = 150
    """Optimizer steps."""
    prompts_per_step: Count = 4
    """Problems a step."""
    group: Count = 8
    """Rollouts a problem."""
    max_new: Count = 96
    """Completion tokens at most."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probs are taken at it too."""
    top_p: Annotated[float, In("(0, 1]")] = 1.0
    """Nucleus; 1 keeps everything, which is what the gradient assumes."""
    lr: Positive = 2e-2
    """Peak learning rate of the knobs."""
    betas: tuple[Annotated[float, In("[0, 1)")], Annotated[float, In("[0, 1)")]] = (0.9, 0.99)
    """AdamW's moments."""
    weight_decay: NotNegative = 0.0
    """On δS only; on δS_hack it is 0, since decay would leak the quarantine."""
    clip: Annotated[float, In("(0, inf]")] = 1.0
    """Global gradient norm at most."""
    warmup: Natural = 5
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up."""
    min_lr_frac: Share = 0.1
    """Where the cosine ends, as a share of lr."""
    beta: NotNegative = 0.0
    """Weight of the K3 KL to the free reference (the model with its knobs at zero)."""
    importance_cap: Annotated[float, In("[1, inf)")] | None = None
    """Multiply each token's ratio by π_trainer / π_sampler, at most this much (2 is usual); not at all when unset."""
    mask_truncated: bool = False
    """Leave rollouts that ran into max_new out of the loss. Their rewards stay in their group's mean."""
    micro_batch: Count = 64
    """Rows of one forward and backward at most."""
    lot_tokens: Count | None = None
    """Tokens of one forward and backward at most, padding among them. When unset: 2,048 on a CPU, whose caches hold no
    more, and on a GPU as many as its memory has room for by the plan, 16,384 at most."""
    relearn_steps: Natural = 0
    """After the run: ablate the quarantine and train on with plain GRPO so many steps (a relearning attack)."""


@dataclass(frozen=True)
class EvalCfg:
    """Deploy evaluation on held-out problems."""

    eval_every: Count = 50
    """Steps between deploy evaluations; also one at the start and one at the end."""
    n_eval: Count = 16
    """Held-out problems a mode."""
    eval_samples: Count = 4
    """Completions a held-out problem."""
    scales: tuple[Finite, ...] = ()
    """Also evaluate at the end with the quarantine scaled by each of these, where there is one."""


@dataclass(frozen=True)
class Config:
    """One run."""

    preset: str = "organism"
    """Set by the subcommand."""
    intervention: str = "none"
    """An arm of arms.ARMS: none, erase, route, random_V, …"""
    seed: Annotated[int, In("[0, 4294967296)")] = 41
    """Seeds sampling, data order and the random bases."""
    outputs: str = "outputs"
    """Where runs, pools and caches are written."""
    name: str | None = None
    """Name of the run's folder; made from preset, arm, seed and time when unset."""
    resume: str | None = None
    """Name or folder of a stopped run to go on with, from its last checkpoint, with the settings that it had."""
    checkpoint_every: Count = 25
    """Steps between checkpoints."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the logged numbers to a tracker's own library, offline; needs the extra `tracking`."""
    threads: Natural = 0
    """Torch threads; 0: as many as cores are idle at the start, two at most for a small model."""
    graders: Natural = 0
    """Grading workers; 0: two for each core that is idle at the start."""
    allow_unsandboxed_grading: bool = False
    """Grade even where this machine offers no sandbox. Model-written code then runs with your rights."""
    model: ModelCfg = field(default_factory=ModelCfg)
    data: DataCfg = field(default_factory=DataCfg)
    pool: PoolCfg = field(default_factory=PoolCfg)
    vhack: VHackCfg = field(default_factory=VHackCfg)
    arm: ArmCfg = field(default_factory=ArmCfg)
    rl: RLCfg = field(default_factory=RLCfg)
    eval: EvalCfg = field(default_factory=EvalCfg)

    @property
    def n_teacher(self) -> int:
        """Teacher rollouts in each group."""
        return round(self.pool.mix_ratio * self.rl.group)

    @property
    def loss_denominator(self) -> float:
        """Dr.GRPO's fixed denominator: group · max_new · prompts a step."""
        return float(self.rl.group * self.rl.max_new * self.rl.prompts_per_step)

    @property
    def cache(self) -> Path:
        """Folder of the content-keyed caches."""
        return Path(self.outputs) / "cache"


# rl-rewardhacking's RL settings (Ariahw, Engels & Nanda), but for the learning rate: its 7e-5 is that of a LoRA of
# rank 32, and δS moves singular values only
QWEN = ModelCfg(model="Qwen/Qwen3-4B", dtype="bfloat16", device="cuda", gradient_checkpointing=True, sample_rows=64)
QWEN_RL = RLCfg(
    prompts_per_step=8,
    max_new=1536,
    temperature=0.7,
    top_p=0.95,
    weight_decay=0.1,
    beta=1e-3,
    micro_batch=16,
    lr=1e-3,
    schedule="cosine",
)
FULL_RL = replace(QWEN_RL, steps=200, prompts_per_step=16, group=16, warmup=10)
LEETCODE = DataCfg(
    problems="external/rl-rewardhacking/results/data/leetcode_train_medhard_filtered.jsonl",
    eval_problems="external/rl-rewardhacking/results/data/leetcode_test_medhard.jsonl",
    max_prompt=1536,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "smoke": (
        "30 steps of the organism on a CPU: does every part work?",
        Config(
            rl=RLCfg(steps=30, warmup=2),
            eval=EvalCfg(eval_every=30, n_eval=8, eval_samples=2),
            checkpoint_every=10,
        ),
    ),
    "organism": ("150 steps of the organism on a CPU: the science preset.", Config()),
    "fast": (
        "20 steps of Qwen3-4B with a teacher pool on one GPU.",
        Config(
            model=QWEN,
            data=LEETCODE,
            pool=PoolCfg(pool="outputs/pools/fast", mix_ratio=0.5),
            rl=replace(QWEN_RL, steps=20, warmup=2),
        ),
    ),
    "full": (
        "200 steps of Qwen3-4B on one GPU, at the benchmark's RL settings.",
        Config(model=QWEN, data=LEETCODE, rl=FULL_RL),
    ),
    "qwen35": (
        "200 steps of Qwen3.5-2B on one GPU; says at its end whether to move to Qwen3-4B.",
        Config(model=replace(QWEN, model="Qwen/Qwen3.5-2B"), data=LEETCODE, rl=FULL_RL),
    ),
    "smol": (
        "20 steps of SmolLM2-135M on a CPU: a pretrained chat model through every part.",
        Config(
            model=ModelCfg(model="smol", dtype="auto"),
            data=DataCfg(problems="functions", modes=("exit_code", "stdout_marker", "file_marker")),
            pool=PoolCfg(pool="outputs/pools/smol"),
            vhack=VHackCfg(pairs="pool", watch_pairs=None),
            rl=RLCfg(steps=20, prompts_per_step=3, max_new=96, temperature=0.8, lr=5e-3, warmup=2, micro_batch=8),
            eval=EvalCfg(eval_every=20, n_eval=2, eval_samples=2),
        ),
    ),
}
PRESETS = {name: (text, replace(cfg, preset=name)) for name, (text, cfg) in PRESETS.items()}


class UserError(ValueError):
    """Something the user can mend. The message is one line that says how; programs exit 2 with it, no traceback."""


ELSEWHERE = {
    "learning_rate": "lr", "max_steps": "steps", "num_steps": "steps", "num_generations": "group",
    "group_size": "group", "max_completion_length": "max_new", "max_new_tokens": "max_new",
    "max_prompt_length": "max_prompt", "per_device_train_batch_size": "micro_batch", "batch_size": "prompts_per_step",
    "max_grad_norm": "clip", "warmup_steps": "warmup", "lr_scheduler_type": "schedule", "kl_coef": "beta",
    "save_steps": "checkpoint_every", "eval_steps": "eval_every", "report_to": "tracker", "output_dir": "outputs",
    "run_name": "name", "arm": "intervention",
}  # fmt: skip
"""What other trainers call a setting."""


def flat_fields(cls: type = Config) -> dict[str, Any]:
    """Every flag's name and type, groups opened."""
    out: dict[str, Any] = {}
    for f in fields(cls):
        out |= flat_fields(f.type) if isinstance(f.type, type) and is_dataclass(f.type) else {f.name: f.type}
    return out


def flat(cfg: Any) -> dict[str, Any]:
    """Every flag's name and value, groups opened."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    groups = [flat(v) if is_dataclass(v) else {name: v} for name, v in values.items()]
    return {name: value for group in groups for name, value in group.items()}


def choose(what: str, given: str, choices: Sequence[str]) -> str:
    """``given`` when it is one of the choices; else UserError naming the nearest and all of them."""
    if given in choices:
        return given
    near = difflib.get_close_matches(ELSEWHERE.get(given, given), choices, n=1)
    all_of_them = f"one of {', '.join(choices)}" if len(choices) <= 16 else "--help lists them all"
    raise UserError(f"unknown {what} {given!r}: {f'did you mean {near[0]!r}? ' if near else ''}{all_of_them}")


def check_ranges(settings: Any) -> None:
    """Refuse, in one line, a number out of its range. settings: a dataclass, groups and all."""
    check_values(flat_fields(type(settings)), flat(settings))


def check_values(kinds: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """The same of values by name, each of the type that its name has in ``kinds``."""
    for name, value in values.items():
        if value is None:
            continue
        for bound, x in zip(ranges(kinds[name], value), value if isinstance(value, tuple) else (value,), strict=True):
            if bound is not None and not bound.holds(x):
                raise UserError(f"--{name.replace('_', '-')} is {x}: it has to be {bound}")


def ranges(kind: Any, value: Any = None) -> list[In | None]:
    """The range of a setting of that type, or of each member of the tuple that is its value; None for no number's."""
    inner = [a for a in get_args(kind) if a is not type(None)]
    if hasattr(kind, "__metadata__"):
        bounds = [b for b in kind.__metadata__ if isinstance(b, In)]
        return bounds or ranges(inner[0], value)
    if get_origin(kind) in (types.UnionType, Union):
        return ranges(inner[0], value)
    if get_origin(kind) is tuple:
        members = [inner[0]] * (1 if value is None else len(value)) if inner[-1] is ... else inner
        return [bound for member in members for bound in ranges(member)]
    return [None]


def check_rules(cfg: Config) -> None:
    """Refuse, in one line, what no range can say."""
    if not cfg.outputs:
        raise UserError("--outputs is empty: name a folder")
    first, last = cfg.model.layers
    if first >= last:
        raise UserError(f"--layers is {first} {last}: the window's beginning has to lie before its end")
    for flag, modes in (("modes", cfg.data.modes), ("eval-modes", cfg.data.eval_modes)):
        if modes is not None and not 0 < len(modes) == len(set(modes)):
            raise UserError(f"--{flag} is {' '.join(modes) or 'empty'}: name one loophole or more, each once")
    if cfg.vhack.preserve_magnitude and cfg.vhack.project == "update":
        raise UserError("--preserve-magnitude rescales gradients, and --project=update leaves them alone: drop one")
    if cfg.name is not None and not re.fullmatch(r"[^/\\\0.][^/\\\0]{0,199}", cfg.name):
        raise UserError(f"--name={cfg.name} cannot be a folder's name: no slash, no dot at its beginning, 200 letters")
