"""Every setting of a run, with its default, and ``PRESETS``: one row a preset, differences only.

Field names are unique over all groups, so that each is one flat flag: ``train.py organism --lr=5e-3 --k=3``.
The docstring under a field is its ``--help``.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import tyro

from projected_grpo.data_types import Mode

Gate = Literal["one_sided", "no_gate", "reverse"]


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
    layers: tuple[float, float] = (0.0, 1.0)
    """Depth window, as fractions of the number of layers, whose Linears get an adapter (Wu & Tang: 0.6 0.75)."""
    svd_rank: int | None = None
    """Train only the top m singular axes of each Linear; all of them when unset."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sampler: Literal["own", "vllm"] = "own"
    """own: the batched sampler here; vllm: vLLM beside the model on the same GPU, given W' (extra `vllm`)."""
    sample_rows: int | None = None
    """Rows sampled at once, all of a step's when unset. Lower it where the key-value cache does not fit. Of no meaning
    to vLLM, which schedules rows itself."""
    vllm_memory: float = 0.3
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
    wording: Literal["default", "train", "heldout"] = "default"
    """Which family of words the hints name."""
    max_prompt: int = 256
    """Tasks with a longer prompt (tokens) are left out, and counted."""


@dataclass(frozen=True)
class PoolCfg:
    """Teacher rollouts mixed into each group."""

    pool: str | None = None
    """Folder of a teacher pool (`just build-pool`); needed when mix_ratio > 0."""
    mix_ratio: float = 0.0
    """Share of each group that is teacher rollouts (0.125 of 8 is one)."""


@dataclass(frozen=True)
class VHackCfg:
    """How the hack direction V is extracted and used."""

    pairs: str = "organism64"
    """A name in pairs.PAIRSETS, or `pool`: pairs from the teacher pool, where the known modes' detector fires."""
    known_modes: tuple[Mode, ...] | None = None
    """Modes that the weak detector knows: pairs of other modes are left out. All modes when unset."""
    k: int = 5
    """Directions extracted for each Linear."""
    k_use: int | None = None
    """Directions used, sliced at load; all k when unset."""
    tau_axis: float = 0.0
    """Axes with S_i / S_0 under this are zeroed."""
    drop_bottom_frac: float = 0.25
    """Global noise floor: axes whose S lies under this quantile of all modules' S are dropped."""
    n_heldout: int = 8
    """The last n pairs never fit V; V is judged on them."""
    length_norm: Literal["live", "mean"] = "live"
    """live: the loss's fixed denominator; mean: each completion by its own length."""
    pair_norm: Literal["none", "unit"] = "unit"
    """unit: each side's gradient scaled to norm 1 before hack minus clean is taken; none: as it is."""
    refresh_every: int = 10
    """Extract V again every n steps, quarantine ablated; 0 keeps the first."""
    gate: Gate = "one_sided"
    """one_sided removes only hack-ward parts, no_gate both signs, reverse mirrors."""
    overshoot: float = 1.0
    """Factor on what is removed."""
    preserve_magnitude: bool = False
    """Rescale what is kept to the norm of the whole gradient."""
    project: Literal["grad", "update"] = "grad"
    """What an arm's act is done on: the gradient, or the optimizer's update, which AdamW has rescaled."""
    threshold_sd: float = 1.5
    """A gate flags a score over the clean sides' mean + this many standard deviations."""
    calibration: Literal["crossfit", "insample"] = "crossfit"
    """Where a gate's threshold comes from: clean sides scored by a direction fitted without them, or by the gate's."""
    shrinkage: float = 0.5
    """Fisher scores: share of the covariance that is replaced by a multiple of the identity, 0 to 1."""
    refresh_pairs: Literal["same", "student", "both"] = "same"
    """What a refresh extracts V from: the same pairs, pairs that the known modes' detector finds in the student's
    recent rollouts, or both. The last two need --known-modes, some and not all."""


@dataclass(frozen=True)
class ArmCfg:
    """Doses of single arms."""

    alpha: float = 2.0
    """rebound: strength."""
    monitor_accuracy: float = 1.0
    """penalty, screening (ORACLE): how often the monitor is right."""
    penalty: float = 3.0
    """penalty: reward taken off what the monitor flags."""
    ablated_share: float = 0.25
    """Arms with a quarantine: share of prompts sampled with the quarantine ablated (routing gates only)."""


@dataclass(frozen=True)
class RLCfg:
    """Dr.GRPO."""

    steps: int = 50
    """Optimizer steps."""
    prompts_per_step: int = 8
    """Problems a step."""
    group: int = 8
    """Rollouts a problem."""
    max_new: int = 96
    """Completion tokens at most."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at it too."""
    top_p: float = 1.0
    """Nucleus; 1 keeps everything, which is what the gradient assumes."""
    lr: float = 2e-2
    """Peak learning rate of the knobs."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's moments."""
    weight_decay: float = 0.0
    """On δS only; on δS_hack it is 0, since decay would leak the quarantine."""
    clip: float = 1.0
    """Global gradient norm at most."""
    warmup: int = 5
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up."""
    min_lr_frac: float = 0.1
    """Where the cosine ends, as a share of lr."""
    beta: float = 0.0
    """Weight of the K3 KL to the free reference (the model with its knobs at zero)."""
    micro_batch: int = 64
    """Rows of one forward and backward."""
    relearn_steps: int = 0
    """After the run: ablate the quarantine and train on with plain GRPO so many steps (a relearning attack)."""


@dataclass(frozen=True)
class EvalCfg:
    """Deploy evaluation on held-out problems."""

    eval_every: int = 50
    """Steps between deploy evaluations; also one at the start and one at the end."""
    n_eval: int = 16
    """Held-out problems a mode."""
    eval_samples: int = 4
    """Completions a held-out problem."""
    scales: tuple[float, ...] = ()
    """Also evaluate at the end with the quarantine scaled by each of these, where there is one."""


@dataclass(frozen=True)
class Config:
    """One run."""

    preset: str = "organism"
    """Set by the subcommand."""
    intervention: str = "none"
    """An arm of proj.ARMS: none, erase, route, random_V, …"""
    seed: int = 41
    """Seeds sampling, data order and the random bases."""
    outputs: str = "outputs"
    """Where runs, pools and caches are written."""
    name: str | None = None
    """Name of the run's folder; made from preset, arm, seed and time when unset."""
    resume: str | None = None
    """Name or folder of a stopped run to go on with, from its last checkpoint; all other settings as they were."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the logged numbers to a tracker's own library, offline; needs the extra `tracking`."""
    threads: int = 0
    """Torch threads; 0 leaves torch's choice. Two runs of one thread each beat one of two."""
    graders: int = 0
    """Grading workers; 0 means one a core."""
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
    max_new=1536, temperature=0.7, top_p=0.95, weight_decay=0.1, beta=1e-3, micro_batch=4, lr=1e-3, schedule="cosine"
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
            rl=RLCfg(steps=30, prompts_per_step=4, warmup=2),
            eval=EvalCfg(eval_every=30, n_eval=8, eval_samples=2),
            checkpoint_every=10,
        ),
    ),
    "organism": ("50 steps of the organism on a CPU: the science preset.", Config()),
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
        "200 steps of Qwen3.5-2B on one GPU, at the same settings; ends with the decision whether to move to Qwen3-4B.",
        Config(model=replace(QWEN, model="Qwen/Qwen3.5-2B"), data=LEETCODE, rl=FULL_RL),
    ),
    "smol": (
        "20 steps of SmolLM2-135M on a CPU: a real pretrained chat model through every part of the loop.",
        Config(
            model=ModelCfg(model="smol", dtype="auto"),
            data=DataCfg(problems="functions", modes=("exit_code", "stdout_marker", "file_marker")),
            pool=PoolCfg(pool="outputs/pools/smol"),
            vhack=VHackCfg(pairs="pool"),
            rl=RLCfg(steps=20, prompts_per_step=3, max_new=96, temperature=0.8, lr=5e-3, warmup=2, micro_batch=8),
            eval=EvalCfg(eval_every=20, n_eval=2, eval_samples=2),
        ),
    ),
}
PRESETS = {name: (text, replace(cfg, preset=name)) for name, (text, cfg) in PRESETS.items()}


class UserError(Exception):
    """Something the user can mend. The message is one line that says how; programs exit 2 with it, no traceback."""


def flat_fields(cls: type = Config) -> dict[str, object]:
    """Every flag's name and type, groups opened."""
    out: dict[str, object] = {}
    for f in fields(cls):
        out |= flat_fields(f.type) if isinstance(f.type, type) and is_dataclass(f.type) else {f.name: f.type}
    return out


def choose(what: str, given: str, choices: Sequence[str]) -> str:
    """``given`` when it is one of the choices; else UserError naming the nearest and all of them."""
    if given in choices:
        return given
    near = difflib.get_close_matches(given, choices, n=1)
    all_of_them = f"one of {', '.join(choices)}" if len(choices) <= 16 else "--help lists them all"
    raise UserError(f"unknown {what} {given!r}: {f'did you mean {near[0]!r}? ' if near else ''}{all_of_them}")


def check_words(argv: Sequence[str]) -> None:
    """Refuse, in one line each, an unknown preset, an unknown flag and a value outside a closed choice."""
    known = flat_fields()
    if not argv:
        raise UserError(f"name a preset: one of {', '.join(PRESETS)} (then --help lists every setting)")
    if not argv[0].startswith("-"):
        choose("preset", argv[0], list(PRESETS))
    for word, following in zip(argv[1:], [*argv[2:], ""], strict=False):  # of one word, "" is left over
        if not word.startswith("--") or word == "--help":
            continue
        flag, has_value, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        name = name.removeprefix("no_") if name not in known else name
        choose("setting", name, list(known))
        kind = known[name]
        if get_origin(kind) is Literal:
            choose(f"value for --{name}", value if has_value else following, [str(a) for a in get_args(kind)])


def parse(argv: Sequence[str]) -> Config:
    """``<preset> --setting=value …`` -> Config. Raises UserError; --help and malformed numbers exit as tyro does."""
    check_words(argv)
    return tyro.extras.overridable_config_cli(PRESETS, args=list(argv), config=(tyro.conf.OmitArgPrefixes,))
