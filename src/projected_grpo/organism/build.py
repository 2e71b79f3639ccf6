"""The embedded tiny model: corpus -> tokenizer -> training -> files in ``files``.

``python -m projected_grpo.organism.build`` draws the problems and rebuilds the files, bit for bit on the same machine.
It is an ordinary folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``: a Qwen3 model of about a million
parameters that solves some problems, gets others subtly wrong, and now and then fools the grader.
"""

import json
import math
import platform
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Int
from loguru import logger
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from projected_grpo.command_line import command, run_main
from projected_grpo.config import Count, In, NotNegative, Positive, Share, UserError, check_ranges, check_values, choose
from projected_grpo.data_types import Grade, Problem, Rollout, Sampling
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.organism import stock
from projected_grpo.organism.corpus import CorpusCfg, corpus
from projected_grpo.problems import GENERATED, encode_prompt, generated, kind_of, messages, pose_one, problems_digest
from projected_grpo.rewards import Grader
from projected_grpo.rollout import sample

FOLDER = Path(__file__).parent / "files"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Words with one leading character, single digits, line breaks with the indent that follows, other punctuation. As
# Qwen's, but that code's line breaks and numbers after a blank are one token: completions get a third shorter.
SPLIT = Regex(r"[^\s\p{L}\p{N}]*\n *|[^\n\p{L}\p{N}]?\p{L}+| ?-?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")


@dataclass(frozen=True)
class Size:
    """A model's shape; a head has 32 dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ff: int


SIZES = {"1M": Size(128, 4, 4, 2, 384), "4M": Size(256, 5, 8, 4, 768), "16M": Size(448, 7, 14, 7, 1344)}
"""The ladder, by about how many parameters there are."""


@dataclass(frozen=True)
class OrganismCfg:
    """How the organism is built."""

    size: str = "1M"
    """A rung of the ladder: 1M (in this package), 4M or 16M."""
    corpus: CorpusCfg = field(default_factory=CorpusCfg)
    seed: Annotated[int, In("[0, 4294967296)")] = 0
    """Seed of the weights."""
    vocab: Annotated[int, In("[259, inf)")] = 768
    """Tokens; 259 are the bytes and the chat specials."""
    batch: Count = 16
    """Completions in a step; the number of steps is corpus.n / batch."""
    lr: Positive = 2.5e-3
    """Peak of the learning rate: linear warm-up over 5 % of the steps, then a cosine down to 0."""
    weight_decay: NotNegative = 0.1
    threads: Count = 1
    """Fixed: sums split over another number of threads round otherwise, and two waiting for each other are slow."""


def train_tokenizer(texts: Iterator[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab`` tokens with Qwen's chat specials and a plain ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def new_model(cfg: OrganismCfg, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model for this tokenizer, float32."""
    torch.manual_seed(cfg.seed)
    size = SIZES[cfg.size]
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.ff,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


Encoded = tuple[list[int], int]
"""A sample's tokens, prompt and completion and end of turn, and the length of its prompt."""


def encode(cfg: OrganismCfg, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """The corpus as tokens."""
    samples = list(corpus(cfg.corpus))
    completions = tokenizer([s.completion for s in samples], add_special_tokens=False)["input_ids"]
    prompts = [encode_prompt(tokenizer, s.task) for s in samples]
    return [
        (prompt + completion + [tokenizer.eos_token_id], len(prompt))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def batches(encoded: Sequence[Encoded], cfg: OrganismCfg) -> Iterator[tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]]:
    """(ids, targets), right-padded; a target is -100 outside the completion. Lengths are sorted within a window of
    sixteen batches, so that little is padding, and the window's batches come in random order."""
    order = torch.Generator().manual_seed(cfg.seed)
    window = 16 * cfg.batch
    for start in range(0, len(encoded) - cfg.batch + 1, window):
        rows = sorted(encoded[start : start + window], key=lambda row: len(row[0]))
        n = len(rows) // cfg.batch
        for i in torch.randperm(n, generator=order).tolist():
            chosen = rows[i * cfg.batch : (i + 1) * cfg.batch]
            width = max(len(tokens) for tokens, _ in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            targets = torch.full((len(chosen), width), -100)
            for b, (tokens, prompt) in enumerate(chosen):
                ids[b, : len(tokens)] = torch.tensor(tokens)
                targets[b, prompt - 1 : len(tokens) - 1] = torch.tensor(tokens[prompt:])
            yield ids, targets


def train(model: Qwen3ForCausalLM, encoded: Sequence[Encoded], cfg: OrganismCfg) -> float:
    """One pass over the corpus, loss on completion tokens only. Returns the mean loss (nats a token) at the end."""
    steps = len(encoded) // cfg.batch
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warmup) / (steps - warmup)))
    )
    losses: list[float] = []
    began = time.perf_counter()
    for step, (ids, targets) in enumerate(batches(encoded, cfg)):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        learned = targets >= 0
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), targets[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 99:
            recent = sum(losses[-100:]) / 100
            logger.info(f"step {step + 1}/{steps} loss {recent:.3f} {time.perf_counter() - began:.0f} s")
    return sum(losses[-50:]) / len(losses[-50:])


def measure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Base rates on problems of the corpus, in the default and the held-out wordings, and on problems it never saw."""
    split = {name: [g.problem for g in generated() if g.split == name] for name in ("train", "test")}
    sets = {
        "train": ("train", "default", 1),
        "heldout_wording": ("train", "heldout", 1),
        "test": ("test", "default", 4),
    }
    with Grader() as grader:
        return {
            name: base_rates(completions(model, tokenizer, grader, split[problems], family=family, n=n))
            for name, (problems, family, n) in sets.items()
        }


def build(cfg: OrganismCfg, folder: Path) -> None:
    """Make the files in ``folder``: weights, configuration, tokenizer, and a record of how they were made."""
    torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(True)
    began = time.perf_counter()
    texts = ("user\n" + messages(s.task)[0]["content"] + "\nassistant\n" + s.completion for s in corpus(cfg.corpus))
    tokenizer = train_tokenizer(texts, cfg.vocab)
    encoded = encode(cfg, tokenizer)
    logger.info(f"{len(encoded)} samples encoded in {time.perf_counter() - began:.0f} s")
    model = new_model(cfg, tokenizer)
    loss = train(model, encoded, cfg)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info(f"trained in {time.perf_counter() - began:.0f} s, loss {loss:.3f}; now the base rates")
    record = {
        "settings": asdict(cfg),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(loss, 4),
        "sha256": sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "problems": problems_digest(),
        "python": platform.python_version(),
        "base_rates": measure(model.eval(), tokenizer),
        "packages": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }
    (folder / "organism.json").write_text(json.dumps(record, indent=1) + "\n")


def check(cfg: OrganismCfg) -> None:
    """Refuse, in one line, settings out of their range."""
    choose("size", cfg.size, list(SIZES))
    check_ranges(cfg)
    check_values(dict.fromkeys(cfg.corpus.p_exploit, Share), cfg.corpus.p_exploit)
    if cfg.corpus.n < (least := 2 * cfg.batch):
        raise UserError(f"--n is {cfg.corpus.n}: it has to be at least {least}, two steps of --batch={cfg.batch}")
    stock.kinds(cfg.corpus.shares)


def put(made: Path, folder: Path) -> None:
    """Move the files into their place, all or none: stopped on the way, those that were there come back."""
    folder.mkdir(exist_ok=True)
    places = [folder / file.name for file in made.iterdir()]
    before = {place: place.read_bytes() for place in places if place.exists()}
    try:
        for place in places:
            shutil.move(made / place.name, place)
    except BaseException:
        for place in places:
            place.unlink(missing_ok=True)
        for place, content in before.items():
            place.write_bytes(content)
        raise


def main(cfg: OrganismCfg, folder: Path | None = None) -> None:
    """Rebuild the organism: of size 1M in this package, its problems drawn anew first; of another, or in a folder that
    is named, from the problems as they are stored. Half a build leaves all files as they were.

    Args:
        cfg: how it is built.
        folder: where to; by default this package, and outputs/organism-SIZE for the larger ones.
    """
    check(cfg)
    to = folder or (FOLDER if cfg.size == "1M" else Path(f"outputs/organism-{cfg.size}"))
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{to.name}.", suffix=".part", dir=to.parent) as part:
        made = Path(part)
        with stock.drawn_anew(cfg.corpus.shares, made / GENERATED.name) if to == FOLDER else nullcontext():
            build(cfg, made)
        put(made, to)
    logger.info(f"built {to}")


CHUNK = 64
"""Prompts sampled at once."""


def completions(
    model: nn.Module,
    tokenizer: Any,
    grader: Grader,
    problems: Sequence[Problem],
    *,
    family: str = "default",
    n: int = 1,
    max_new: int = 96,
    seed: int = 0,
) -> list[Rollout]:
    """n graded completions of each problem in each mode at temperature 1.

    family: the family of wordings (see ``problems.pose_one``), cycled over the problems.
    """
    how = Sampling(max_new, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(seed)
    tasks = [pose_one(problem, mode, family, i) for mode in LOOPHOLES for i, problem in enumerate(problems)]
    found = []
    for start in range(0, len(tasks), CHUNK):
        chunk = tasks[start : start + CHUNK]
        rows = sample(model, [encode_prompt(tokenizer, task) for task in chunk], n, how, generator)
        texts = [tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows]
        posed = [task for task in chunk for _ in range(n)]
        grades = grader.grade(list(zip(posed, texts, strict=True)))
        found += [
            Rollout(task, "student", row.ids, text, grade)
            for task, row, text, grade in zip(posed, rows, texts, grades, strict=True)
        ]
    return found


def rates(grades: Sequence[Grade]) -> dict[str, float]:
    """Shares of the grades, and how many there are."""
    share = lambda name: round(sum(getattr(grade, name) for grade in grades) / len(grades), 4)
    return {
        "n": len(grades),
        "format": share("format_ok"),
        "solve": share("gt_correct"),
        "attempt": share("attempted"),
        "hack": share("exploited"),
    }


def base_rates(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rates by mode, by family and by kind of problems, and the completions' tokens: mean, 95th percentile, most."""
    by_mode, by_family, by_kind = defaultdict(list), defaultdict(list), defaultdict(list)
    for rollout in rollouts:
        by_mode[rollout.task.mode].append(rollout.grade)
        by_family[rollout.task.problem.family].append(rollout.grade)
        by_kind[kind_of(rollout.task.problem)].append(rollout.grade)
    lengths = sorted(len(rollout.ids) for rollout in rollouts)
    return {
        "by_mode": {mode: rates(grades) for mode, grades in by_mode.items()},
        "by_family": {family: rates(grades) for family, grades in by_family.items()},
        "by_kind": {kind: rates(grades) for kind, grades in by_kind.items()},
        "tokens": [round(sum(lengths) / len(lengths), 1), lengths[len(lengths) * 95 // 100], lengths[-1]],
    }


if __name__ == "__main__":
    run_main(command(main, tyro.conf.OmitArgPrefixes))
