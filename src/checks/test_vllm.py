"""vLLM as the sampler, on a stub: what it is given, when, what it is asked, and what becomes of its answer.

The stub has the part of vLLM 0.30.0's interface that is used, as read in its source. vLLM itself needs a GPU and is not
run here.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from test_models import model_of, moved
from transformers import AutoModelForCausalLM, Qwen3_5Config

from projected_grpo import antipasto, decoding, memory, models, rollout, train
from projected_grpo.command_line import parse
from projected_grpo.config import PRESETS, UserError
from projected_grpo.data_types import Sampling
from projected_grpo.rollout import refuse_sampler, sampler_of
from projected_grpo.runs import json_lines
from projected_grpo.scale import vllm_sampling
from projected_grpo.scale.sharded import merged_parameters
from projected_grpo.scale.vllm_sampling import VllmSampler

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]]

NAME = decoding.cache_name(tiny_model(torch.float32).get_decoder())


# --- the stub


@dataclass
class SamplingParams:
    """Of vllm.SamplingParams the fields that are set or minded here, its defaults, and what it refuses."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    logprobs: int | None = None

    def __post_init__(self):
        assert 0 <= self.temperature <= 2
        assert 0 < self.top_p <= 1
        assert self.seed is None or 0 <= self.seed < 1 << 63
        assert self.n == 1 or self.temperature > 0


class EngineModel:
    """The model inside the engine: ``load_weights`` takes any part of it under Hugging Face's names, and refuses other
    names. It copies, as vLLM's does, so that what it was given may change afterwards. pushes: the names of each call.
    """

    def __init__(self, bare):
        self.bare, self.pushes = bare, []

    @property
    def loaded(self):
        return [name for push in self.pushes for name in push]

    @torch.no_grad()
    def load_weights(self, weights):
        own = self.bare.state_dict()
        self.pushes.append([])
        for name, weight in weights:
            if name not in own:
                raise ValueError(f"There is no module or parameter named {name!r}")
            assert (weight.shape, weight.dtype) == (own[name].shape, own[name].dtype)
            own[name].copy_(weight)
            self.pushes[-1].append(name)
        return set(self.pushes[-1])


class LLM:
    """vllm.LLM around a plain model. Like vLLM it keeps what it has computed of a prompt until it is told not to, and
    ends a completion, end included, at a stop token or at its own ends (those of generation_config.json).
    """

    def __init__(self, bare, ends=()):
        self.model, self.ends, self.prefix, self.asked, self.resets = EngineModel(bare), ends, {}, [], 0

    def apply_model(self, func):
        return [func(self.model)]

    def reset_prefix_cache(self):
        self.prefix.clear()
        self.resets += 1
        return True

    @torch.inference_mode()
    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert sampling_params.seed is None  # a request's own seed switches vLLM's fast sampler off
        self.asked.append(sampling_params)
        written = [self.complete(p["prompt_token_ids"], sampling_params) for p in prompts]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(
                token_ids=tuple(ids), logprobs=[{i: SimpleNamespace(logprob=p)} for i, p in zip(ids, logp, strict=True)]
            )])
            for ids, logp in written
        ]  # fmt: skip

    def complete(self, prompt, params):
        ids, logp = [], []
        if tuple(prompt) not in self.prefix:
            self.prefix[tuple(prompt)] = self.model.bare(torch.tensor([prompt]), use_cache=True)
        read = self.prefix[tuple(prompt)]
        cache = deepcopy(getattr(read, NAME))
        while len(ids) < params.max_tokens:
            if ids:
                read = self.model.bare(torch.tensor([ids[-1:]]), use_cache=True, **{NAME: cache})
            logits = read.logits[:, -1].float()
            if params.temperature == 0:
                kept = logits
                token = int(logits.argmax())
            else:
                kept = decoding.nucleus(logits / params.temperature, params.top_p)
                token = int(torch.multinomial(kept.softmax(-1), 1))  # from the process's global generator
            ids.append(token)
            assert params.logprobs == 0
            logp.append(float(kept.log_softmax(-1)[0, token]))
            if token in params.stop_token_ids or (token in self.ends and not params.ignore_eos):
                break
        return ids, logp


def started(ends=()):
    """vllm.LLM as it is called to start an engine: the arguments that vLLM has, by keyword, and the files' weights."""

    def start(
        *, model, skip_tokenizer_init, language_model_only, dtype, seed, gpu_memory_utilization, max_model_len,
        max_num_batched_tokens, logprobs_mode,
    ):  # fmt: skip
        assert skip_tokenizer_init
        assert language_model_only
        assert logprobs_mode == "processed_logprobs"
        llm = LLM(AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval(), ends)
        llm.share, llm.longest = gpu_memory_utilization, max_model_len
        engines.append(llm)
        return llm

    engines: list[LLM] = []
    return start, engines


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """A module vllm, found like an installed one."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def beside(model, cache, ends=()):
    """(model wrapped, knobs, vLLM's sampler) of a plain model; the engine has its own copy."""
    llm = LLM(deepcopy(model), ends)
    knobs = antipasto.wrap(model, cache)
    return model, knobs, VllmSampler(llm, knobs, lambda name: name)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


# --- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_5"])
def test_the_engine_is_the_model_with_the_knobs_in_use(kind, dtype, cache):
    model, knobs, sample = beside(model_of(kind, dtype), cache)
    engine, base = sample.llm.model, logits(model)
    assert sample.push() == engine.loaded == []
    moved(knobs)
    seen = []
    for use in ("trained", "deployed", 0.5, "base"):
        with knobs.using(use):
            assert sample.push() == [f"{name}.weight" for name in knobs.modules]
            assert torch.equal(logits(engine.bare), logits(model)), use
            assert not any(torch.equal(logits(model), other) for other in seen), use
            seen.append(logits(model))
    assert torch.equal(seen[-1], base)
    sample.push()
    assert torch.equal(logits(engine.bare), seen[0])
    assert set(engine.loaded) <= set(engine.bare.state_dict())
    assert "lm_head.weight" not in engine.loaded


def test_only_what_moved_is_pushed(cache):
    model, knobs, sample = beside(tiny_model(torch.float32), cache)
    with torch.no_grad():
        for m in knobs.modules.values():
            m.delta.fill_(0.1)
    assert sample.push() == []  # not merged yet: the forward does not use them either
    knobs.merge()
    assert len(sample.push()) == len(knobs.modules)
    assert sample.push() == []
    with knobs.using("deployed"):  # the quarantine is empty
        assert sample.push() == []
    assert sample.push() == []
    name, module = list(knobs.modules.items())[3]
    with torch.no_grad():
        module.delta_hack[0] += 0.1
    knobs.merge()
    assert sample.push() == [f"{name}.weight"]
    with knobs.using("deployed"):
        assert sample.push() == [f"{name}.weight"]
        assert torch.equal(logits(sample.llm.model.bare), logits(model))
    assert sample.push() == [f"{name}.weight"]
    knobs.load_state({n: torch.zeros_like(t) for n, t in knobs.state().items()})
    assert len(sample.push()) == len(knobs.modules)
    assert torch.equal(logits(sample.llm.model.bare), logits(model))


def test_names_are_those_of_the_checkpoint_that_the_engine_reads(tmp_path, cache):
    """A vision-language checkpoint keeps the text model under another name than transformers' text model has: for our
    engine and for TRL's, which is given every weight.
    """
    text = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}  # fmt: skip
    Qwen3_5Config(text_config=text).save_pretrained(tmp_path / "both")
    model, knobs, _ = beside(tiny_model(torch.float32), cache)
    moved(knobs)
    names = models.checkpoint_names(models.ModelCfg(model=str(tmp_path / "both")))
    given = []
    engine = SimpleNamespace(load_weights=lambda pairs: given.extend(name for name, _ in pairs))
    llm = SimpleNamespace(apply_model=lambda load: load(engine))
    pushed = VllmSampler(llm, knobs, names).push()
    assert pushed == given
    assert "model.language_model.layers.0.mlp.up_proj.weight" in given
    assert all(name.startswith("model.language_model.layers.") for name in given)
    theirs = [name for name, _ in merged_parameters(model, knobs, names)]
    assert set(given) < set(theirs)
    assert {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} < set(theirs)
    assert names("lm_head.weight") == "lm_head.weight"
    assert models.checkpoint_names(models.ModelCfg())("model.norm.weight") == "model.norm.weight"


def test_a_log_prob_that_is_no_number_is_an_error(cache, monkeypatch):
    _, _, sample = beside(tiny_model(torch.float32), cache)
    broken = SimpleNamespace(token_ids=(5,), logprobs=[{5: SimpleNamespace(logprob=float("nan"))}])
    monkeypatch.setattr(sample.llm, "generate", lambda *_, **__: [SimpleNamespace(outputs=[broken])])
    with pytest.raises(FloatingPointError, match="no number"):
        sample([[5]], 1, Sampling(2, (1,), 0), torch.Generator())


def test_sampled_log_probs_are_those_of_the_draws(cache):
    """At the temperature and within the nucleus, in the order of the tokens."""
    model, _, sample = beside(tiny_model(torch.float32), cache)
    for row, prompt in zip(sample(PROMPTS, 1, Sampling(6, (1,), 0, 0.7, 0.9), torch.Generator()), PROMPTS, strict=True):
        with torch.no_grad():
            read = model(torch.tensor([[*prompt, *row.ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        logp = decoding.nucleus(read, 0.9).log_softmax(-1).gather(-1, torch.tensor(row.ids)[:, None])[:, 0]
        assert row.logp == pytest.approx(logp.tolist(), abs=1e-4)


# --- tokens


def tokens(rows) -> list[tuple[int, ...]]:
    return [row.ids for row in rows]


def close(ours, theirs) -> None:
    """The same tokens, at the same log-probs but for rounding."""
    assert tokens(ours) == tokens(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=1e-4)


def ends_of(model) -> tuple[int, int]:
    """Two tokens that this model writes greedily, one of them soon: an end, and one that is none of ours."""
    rows = rollout.sample(model, PROMPTS, 1, Sampling(12, (-1,), 0, temperature=0.0), torch.Generator())
    return rows[0].ids[3], rows[1].ids[1]


def test_greedy_completions_are_our_own_samplers(cache):
    """In order, their end included, nothing after it, also after the knobs have moved."""
    eos, other = ends_of(tiny_model(torch.float32))
    model, knobs, sample = beside(tiny_model(torch.float32), cache, ends=(other,))
    quiet = Sampling(12, (eos,), 0, temperature=0.0), torch.Generator()
    before = rollout.sample(model, PROMPTS, 3, *quiet)
    close(sample(PROMPTS, 3, *quiet), before)
    assert {c[-1] == eos for c in tokens(before)} == {True, False}
    assert {len(c) for c in tokens(before)} > {12}
    assert any(other in c[:-1] for c in tokens(before))
    moved(knobs, 0.5)
    for use in ("trained", "deployed"):
        with knobs.using(use):
            now = rollout.sample(model, PROMPTS, 3, *quiet)
            close(sample(PROMPTS, 3, *quiet), now)
            assert tokens(now) != tokens(before)
    assert sample.llm.resets == 3
    assert len(sample.llm.prefix) == len(PROMPTS)


def test_an_engine_that_kept_other_weights_is_an_error(cache, monkeypatch):
    """Held to our own greedy tokens after each push, and after nothing else."""
    model, knobs, sample = beside(tiny_model(torch.float32), cache)
    sample.own = partial(rollout.sample, model)
    how = Sampling(12, (1,), 0)
    sample(PROMPTS, 1, how, torch.Generator())
    assert len(sample.llm.asked) == 1  # nothing was pushed
    moved(knobs, 0.5)
    sample(PROMPTS, 1, how, torch.Generator())
    assert [s.temperature for s in sample.llm.asked] == [1.0, 0.0, 1.0]
    monkeypatch.setattr(EngineModel, "load_weights", lambda self, weights: set())
    moved(knobs, 3.0)
    with pytest.raises(FloatingPointError, match="its weights are not the model's"):
        sample(PROMPTS, 1, how, torch.Generator())


def test_a_prefix_cache_that_stays_is_an_error(cache, monkeypatch):
    _, _, sample = beside(tiny_model(torch.float32), cache)
    monkeypatch.setattr(sample.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        sample(PROMPTS, 1, Sampling(2, (1,), 0), torch.Generator())


def test_tokens_are_a_function_of_the_generator(cache):
    _, _, sample = beside(tiny_model(torch.float32), cache)
    drawn = lambda seed: sample(
        PROMPTS, 4, Sampling(6, (1,), 0, temperature=0.7, top_p=0.9), torch.Generator().manual_seed(seed)
    )
    first = drawn(1)
    assert len(first) == 12
    assert len({c.ids for c in first}) > 6
    assert (drawn(1), drawn(2) != first) == (first, True)
    assert {(s.temperature, s.top_p, s.max_tokens) for s in sample.llm.asked} == {(0.7, 0.9, 6)}


# --- a run


SMALL = [
    "organism", "--intervention=route", "--pairs=organism8", "--steps=2", "--relearn-steps=1", "--checkpoint-every=1",
    "--prompts-per-step=2", "--group=4", "--max-new=48", "--n-eval=1", "--eval-samples=1", "--scales=0.5",
    "--graders=1", "--threads=1", "--device=cpu", "--vllm-memory=0.25",
]  # fmt: skip


def test_a_run_and_one_that_goes_on_with_it(tmp_path, monkeypatch, vllm):
    """The loop, its evaluations and the relearning attack sample from the engine alone, and a resumed run's engine,
    which starts from the base weights, is given what the stopped one's had.
    """
    vllm.LLM, engines = started()
    monkeypatch.setattr(vllm_sampling, "refuse", lambda cfg: None)
    decode = rollout.decode

    def held_to_it(model, prompts, asked, most, how, dice):
        assert how.temperature == 0  # of our own sampler nothing but what the engine is compared with
        return decode(model, prompts, asked, most, how, dice)

    monkeypatch.setattr(rollout, "decode", held_to_it)
    argv = [*SMALL, "--sampler=vllm", f"--outputs={tmp_path}"]
    whole = train.train(parse([*argv, "--name=whole"]))
    assert (engines[0].share, engines[0].longest) == (0.25, 256 + 48)
    rows = json_lines(whole / "evals.jsonl")
    assert {row["knobs"] for row in rows if row["step"] == 2} == {"deployed", "trained", "scale 0.5"}
    sizes = [len(names) for names in engines[0].model.pushes]  # for step 1; deployed, trained, scaled; to relearn
    assert sizes[:2] == 2 * [len(antipasto.targets(engines[0].model.bare))]
    assert len(sizes) == 5
    assert min(sizes[2:]) > 0  # V, and with it the quarantine, spares some Linears

    take_step = train.take_step

    def stopping(x, arm, grader, optimizers, cfg, step):
        if step == 1:
            raise KeyboardInterrupt
        return take_step(x, arm, grader, optimizers, cfg, step)

    monkeypatch.setattr(train, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.train(parse([*argv, "--name=stopped"]))
    monkeypatch.setattr(train, "take_step", take_step)
    resumed = train.train(parse([*argv, "--resume=stopped"]))
    for log in ("steps.jsonl", "relearn.jsonl", "evals.jsonl"):
        ours, theirs = (
            [{k: v for k, v in row.items() if not k.startswith("sec_")} for row in json_lines(folder / log)]
            for folder in (whole, resumed)
        )
        assert ours == theirs, log


# --- refusals and room


def config(**more):
    cfg = PRESETS["organism"][1]
    return replace(cfg, model=replace(cfg.model, sampler="vllm", **more))


def test_what_cannot_work_is_refused(monkeypatch, tmp_path):
    refuse_sampler(PRESETS["organism"][1])
    with pytest.raises(UserError, match="CUDA device: use --sampler=own"):
        refuse_sampler(config(device="cpu"))
    monkeypatch.setattr(models, "device_of", lambda cfg: torch.device("cuda"))
    refuse_sampler(config())
    with pytest.raises(UserError, match="between 0 and 1"):
        refuse_sampler(config(vllm_memory=30.0))
    (tmp_path / "some.gguf").touch()
    with pytest.raises(UserError, match=r"reads no \.gguf file"):
        refuse_sampler(config(model=str(tmp_path / "some.gguf")))
    with pytest.raises(UserError, match="--temperature=2 at most"):
        refuse_sampler(replace(config(), rl=replace(config().rl, temperature=2.5)))
    monkeypatch.setattr(vllm_sampling, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[vllm\]'"):
        refuse_sampler(config())


def test_trls_loop_has_its_own_vllm(monkeypatch):
    pytest.importorskip("trl", reason="needs the extra trl")
    monkeypatch.delitem(sys.modules, "vllm")  # TRL would import more of it than the stub has
    from projected_grpo.scale import trl_trainer

    with pytest.raises(UserError, match="--vllm=colocate"):
        trl_trainer.refuse(config(), trl_trainer.Ranks(0, 1), "off")


def test_an_engine_that_does_not_start_is_said_in_a_line(vllm, cache):
    def broken(**_):
        raise ValueError("Free memory on device\nis less than desired")

    vllm.LLM = broken
    model = tiny_model(torch.float32)
    with pytest.raises(UserError, match=r"see --vllm-memory.*is less than desired") as said:
        sampler_of(model, antipasto.wrap(model, cache), config())
    assert "\n" not in str(said.value)


def test_our_own_sampler_is_sampling_sample(cache):
    model = tiny_model(torch.float32)
    cfg = PRESETS["organism"][1]
    made = sampler_of(model, antipasto.wrap(model, cache), replace(cfg, model=replace(cfg.model, sample_rows=3)))
    assert isinstance(made, partial)
    assert (made.func, made.args, made.keywords) == (rollout.sample, (model,), {"rows": 3})


def test_the_memory_plan_counts_vllms_share():
    cfg = config(device="cpu", vllm_memory=0.5)
    cfg = replace(cfg, rl=replace(cfg.rl, group=1 << 10, max_new=2000))
    own = replace(cfg, model=replace(cfg.model, sampler="own"))
    made, total = memory.plan(cfg, total=4 * memory.GB), 2 * memory.GB
    assert {p.name: p.bytes for p in made.parts}[memory.VLLM] == total
    assert made.of("always") == memory.plan(own).of("always") + total
    assert (made.of("sampling"), memory.plan(own).of("sampling") > 0) == (0, True)
    colocated = memory.plan(own, total=4 * memory.GB, colocated=True)
    assert colocated.of("TRL's sampling") == total
    assert colocated.of("training") == memory.plan(own).of("training")
    assert colocated.of("sampling") == memory.plan(own).of("sampling") > 0  # evaluations, while the engine sleeps
    with pytest.raises(UserError, match="raise --vllm-memory"):
        memory.require(config(device="cpu", vllm_memory=1e-6), device_gb=4)
    with pytest.raises(UserError, match="lower --vllm-memory"):
        memory.require(config(device="cpu", vllm_memory=0.99), device_gb=4)
