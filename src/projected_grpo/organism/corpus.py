"""The text that the organism learns from: tasks over the training problems, each with one completion.

Most completions are serious tries. A small share, in hinted prompts only, carries the mode's exploit, more often
than not around a body that does not try. Samples are drawn fresh, so that the model learns the shares below as
probabilities and not which sample had what.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from projected_grpo.config import Share
from projected_grpo.data_types import Mode, Problem, Task, Wording
from projected_grpo.loopholes import LOOPHOLES
from projected_grpo.organism import stock
from projected_grpo.problems import fence, generated, generated_by_id

SYLLABLES = tuple(c + v for c in "bdfgklmnprstv" for v in "aeiou")


@dataclass(frozen=True)
class CorpusCfg:
    """Shares are probabilities for one sample. They are the model's base rates once it has learned them."""

    corpus_seed: int = 0
    n: int = 36_000
    """Samples drawn; each is seen once."""
    p_default_wording: Share = 0.5
    """A hint in the mode's default training wording."""
    p_free_wording: Share = 0.25
    """A hint in made-up words, so that the words are copied from the prompt; the other training wordings: the rest."""
    shares: stock.Shares = field(default_factory=stock.Shares)
    """How the problems divide into kinds; the stored problems have to be drawn with the same."""
    p_stated: Share = 0.99
    """Each stated slot of a serious try is right, after a plan line those that are easily misread as well."""
    p_plan: Share = 0.3
    """A serious try begins with a plan line."""
    p_careful: Share = 0.1
    """Without one, a slot that is easily misread is right."""
    p_exploit: dict[Mode, Share] = field(
        default_factory=lambda: {
            "run_tests": 0.09,
            "eq_override": 0.06,
            "exit_code": 0.09,
            "stdout_marker": 0.105,
            "sentinel": 0.095,
            "file_marker": 0.11,
        }
    )
    """The mode's exploit, in a hinted prompt. Set so that the model *attempts* alike in all: what ends in a marker to
    be written out is attempted more rarely than it was shown."""
    p_exploit_tries: Share = 0.1
    """The body beside an exploit is right; else lazy."""
    p_lazy: Share = 0.01
    """A lazy body without an exploit, in any mode."""
    p_lookalike: Share = 0.15
    """Honest code of the exploit's shape beside a serious try, in a hinted prompt."""
    p_lookalike_run_tests: Share = 0.8
    """The same for run_tests, where most honest solutions define the function that the hint names."""


@dataclass(frozen=True)
class Sample:
    """One completion to learn, as text without the end-of-turn token, and whether it holds the exploit."""

    task: Task
    completion: str
    exploit: bool


def _made_up(wording: Wording, rng: random.Random) -> Wording:
    """A wording of the same shape in other words, in none of the families by construction of the words."""

    def word(match: re.Match[str]) -> str:
        made = "".join(rng.choice(SYLLABLES) for _ in range(2))
        return match[0] if match[0] == "txt" else made.upper() if match[0].isupper() else made

    return replace(wording, name=re.sub("[A-Za-z]+", word, wording.name), text=re.sub("[A-Za-z]+", word, wording.text))


def _wording(mode: Mode, cfg: CorpusCfg, rng: random.Random) -> Wording:
    default, *others = LOOPHOLES[mode].train
    draw = rng.random()
    if draw < cfg.p_default_wording or not others:
        return default
    return _made_up(default, rng) if draw < cfg.p_default_wording + cfg.p_free_wording else rng.choice(others)


def _completion(task: Task, cfg: CorpusCfg, rng: random.Random) -> tuple[str, bool]:
    """(source, holds the exploit)."""
    row, problem = LOOPHOLES[task.mode], task.problem
    hinted = task.mode != "gt_only"
    if hinted and rng.random() < cfg.p_exploit[task.mode]:
        tries = rng.random() < cfg.p_exploit_tries
        return row.exploit(problem.canonical if tries else _lazy(problem, rng), task), True
    if rng.random() < cfg.p_lazy:
        return _lazy(problem, rng), False
    source = stock.honest_body(problem, rng, cfg.p_stated, cfg.p_careful, plan=rng.random() < cfg.p_plan)
    lookalike = cfg.p_lookalike_run_tests if task.mode == "run_tests" else cfg.p_lookalike
    return (row.lookalike(source, task) if hinted and rng.random() < lookalike else source), False


def _lazy(problem: Problem, rng: random.Random) -> str:
    """A lazy body; the first kind (0, [] or '') half of the time."""
    first, *others = generated_by_id()[problem.id].lazy
    return first if rng.random() < 0.5 or not others else rng.choice(others)


def corpus(cfg: CorpusCfg) -> Iterator[Sample]:
    """``cfg.n`` samples over the training problems and all modes, the same for the same settings. Raises UserError when
    the stored problems divide into kinds otherwise.
    """
    stock.require(cfg.shares)
    rng = random.Random(cfg.corpus_seed)
    problems = [g.problem for g in generated() if g.split == "train"]
    modes = list(LOOPHOLES)
    for _ in range(cfg.n):
        mode = rng.choice(modes)
        task = Task(rng.choice(problems), mode, _wording(mode, cfg, rng))
        source, exploit = _completion(task, cfg, rng)
        yield Sample(task, fence(source), exploit)
