"""Every supported architecture in float32 and bfloat16: identity at zero, sampling, row gradients; loading."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, write_problems
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    T5Config,
    modeling_utils,
)
from transformers.utils import is_flash_attn_2_available

from projected_grpo import antipasto, loss, memory, models, problems, rollout
from projected_grpo.command_line import parse
from projected_grpo.config import PRESETS, Config, ModelCfg, UserError
from projected_grpo.data_types import Completion, Sampling
from projected_grpo.problems import as_function, function_source, pose_one, tasks_for
from projected_grpo.rewards import Grader
from projected_grpo.rollout import h4_decision

KINDS = ("qwen3", "llama", "qwen3_5")
DTYPES = (torch.float32, torch.bfloat16)


def model_of(kind: str, dtype: torch.dtype = torch.float32, layers: int = 2):
    if kind == "qwen3":
        return tiny_model(dtype, layers=layers)
    torch.manual_seed(0)
    common = dict(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=12, pad_token_id=0, eos_token_id=1)  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common)).to(dtype).eval()
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    kinds = ["linear_attention", "full_attention"] * (layers // 2)
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common, **linear, layer_types=kinds)).to(dtype).eval()


def save_with_words(kind: str, folder: Path) -> Path:
    """That random model in a folder, with the organism's tokenizer: what it writes is nonsense."""
    _, tokenizer = models.load(ModelCfg())
    model = model_of(kind)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def moved(knobs: antipasto.Knobs, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in knobs.modules.values():
            for knob in (m.delta, m.delta_hack):
                knob.copy_(scale * torch.randn(knob.shape, generator=generator))
    knobs.merge()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_identity_at_zero_to_the_bit(kind, dtype, cache, batch):
    ids, _ = batch
    model = model_of(kind, dtype)
    base = model(ids).logits
    knobs = antipasto.wrap(model, cache)
    assert torch.equal(model(ids).logits, base)
    with knobs.row_gradients(len(ids)):
        assert torch.equal(model(ids).logits, base)
    moved(knobs)
    assert not torch.equal(model(ids).logits, base)
    with knobs.using("base"):
        assert torch.equal(model(ids).logits, base)
    assert {m.delta.dtype for m in knobs.modules.values()} == {torch.float32}
    assert {m.U.dtype for m in knobs.modules.values()} == {dtype}


def test_every_projection_of_a_gated_delta_net_is_a_target(cache):
    knobs = antipasto.wrap(model_of("qwen3_5"), cache)
    first = {n.rpartition(".")[2] for n in knobs.modules if ".0.linear_attn." in n}
    assert first == set(antipasto.GATED_DELTA_NET)
    assert {n.rpartition(".")[2] for n in knobs.modules if ".1." in n} == set(antipasto.ATTENTION_AND_MLP)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_in_lots_and_with_rows_that_end(kind, dtype, cache):
    """Greedy completions of an adapted model are the model's own argmax, also after rows have left the cache."""
    model = model_of(kind, dtype)
    moved(antipasto.wrap(model, cache))
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]]
    how, dice = Sampling(12, (1,), 0), torch.Generator().manual_seed(3)
    got = rollout.sample(model, prompts, 3, how, dice, rows=4)
    assert len(got) == 9
    assert rollout.sample(model, prompts, 5, how, dice, rows=2)[0].ids
    greedy = rollout.sample(model, prompts, 1, replace(how, temperature=0.0), dice, rows=2)
    if dtype is torch.bfloat16:  # ties of two logits are rounded apart by the batch's shape
        return
    for prompt, row in zip(prompts, greedy, strict=True):
        logits = model(torch.tensor([[*prompt, *row.ids]])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(row.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_row_gradients_are_autograds_of_the_gain(kind, cache, batch, monkeypatch):
    """Brute force: y = W x + U((δS + δS_hack + ε_i) ⊙ Vh x) in ordinary operations, one backward a row."""
    ids, mask = batch
    model = model_of(kind)
    knobs = antipasto.wrap(model, cache)
    moved(knobs)
    weight = torch.tensor([1.0, -0.5, 0.25, 2.0])
    G = loss.row_gradients(model, knobs, ids, mask, weight).G

    def by_hand(m, x):
        gain = m.delta + m.delta_hack + m.probe
        return m.linear(x) + (F.linear(x, m.Vh) * gain) @ m.U.T

    monkeypatch.setattr(antipasto.AntipastoLinear, "forward", by_hand)
    for i in range(len(ids)):
        for m in knobs.modules.values():
            m.probe = torch.zeros_like(m.delta).requires_grad_()
        (-weight[i] * loss.token_logprobs(model, ids[i : i + 1], mask[i : i + 1]).sum()).backward()
        for name, m in knobs.modules.items():
            assert m.probe.grad.norm() > 0
            torch.testing.assert_close(G[name][i], m.probe.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_row_gradients_point_where_float32s_do(kind, cache, batch):
    ids, mask = batch
    flat = []
    for dtype in DTYPES:
        model = model_of(kind, dtype)
        G = loss.row_gradients(model, antipasto.wrap(model, cache), ids, mask, torch.tensor([1.0, -0.5, 0.25, 2.0])).G
        assert {g.dtype for g in G.values()} == {torch.float32}
        flat.append(torch.cat([g.flatten() for g in G.values()]))
    assert F.cosine_similarity(*flat, dim=0) > 0.98


def named(weights) -> dict[str, torch.Tensor]:
    return {f"w{i}": w for i, w in enumerate(weights)}


def test_svd_is_cached_by_content_in_the_weights_dtype(cache, monkeypatch):
    weights = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 8), torch.randn(6, 4).to(torch.bfloat16)]
    made, plain = [], antipasto.basis_of
    monkeypatch.setattr(antipasto, "basis_of", lambda W, rank: (made.append((tuple(W.shape), rank)), plain(W, rank))[1])
    first = antipasto.factor(named(weights[:1]), cache)["w0"]
    paths = antipasto.factor(named([*weights, weights[0].clone()]), cache)
    assert paths["w0"] == paths["w4"] == first
    assert len(made) == 4  # the first is not done again
    for name, w in named(weights).items():
        U, Vh = antipasto.load(antipasto.factor(named(weights), cache)[name])
        assert U.dtype == Vh.dtype == w.dtype
        exact = plain(w)  # what the adapter would hold of it, half the bytes or not
        assert torch.equal(U, exact[0].to(w.dtype))
        assert torch.equal(Vh, exact[1].to(w.dtype))
        assert max(antipasto.errors_of(w.float(), *exact)) < antipasto.EXACT
    antipasto.factor(named([weights[0] + 1e-6]), cache)
    assert len(made) == 5
    antipasto.factor(named(weights[:1]), cache, rank=2)
    assert made[5:] == [((6, 4), 2)]


def of_spectrum(o: int, i: int, sigma: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, len(sigma), generator=generator, dtype=torch.float64))[0] for n in (o, i))
    return ((U * sigma.double()) @ V.T).float()


FALLING = torch.logspace(0, -5, 60)


@pytest.mark.parametrize(("o", "i"), [(60, 150), (150, 60), (60, 60)])
@pytest.mark.parametrize("sigma", [FALLING, torch.ones(60), FALLING * (torch.arange(60) < 40), torch.zeros(60)])
def test_the_gram_route_is_an_svd_whatever_the_spectrum(o, i, sigma):
    """Falling by 1e5, all alike, of rank 40, and zero."""
    W = of_spectrum(o, i, sigma)
    U, Vh = antipasto.gram_basis(W)
    assert max(antipasto.errors_of(W, U.float(), Vh.float())) < antipasto.EXACT
    found = (U.T @ W.double() @ Vh.T).diagonal()
    torch.testing.assert_close(found, torch.linalg.svdvals(W.double()), rtol=1e-5, atol=1e-7)
    few = antipasto.gram_basis(W, 5)
    assert [tuple(t.shape) for t in few] == [(o, 5), (5, i)]
    assert max(antipasto.errors_of(W, *few)) < antipasto.EXACT


def test_a_rank_computes_what_it_keeps(monkeypatch):
    """The same subspace as the whole factorisation's, from no larger eigenproblem than the block's."""
    W, sizes, plain = of_spectrum(120, 200, torch.logspace(0, -3, 120)), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: (sizes.append(len(G)), plain(G))[1])
    U, Vh = antipasto.basis_of(W, 6)
    assert max(sizes) == 2 * 6 + 8
    whole_U, _, whole_Vh = torch.linalg.svd(W.double())
    for ours, theirs in ((U, whole_U[:, :6]), (Vh.T, whole_Vh[:6].T)):
        torch.testing.assert_close((ours.double() * theirs).sum(0).abs(), torch.ones(6).double(), rtol=0, atol=1e-5)
    noise = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))  # hardly a gap between two values
    assert max(antipasto.errors_of(noise, *antipasto.basis_of(noise, 6))) < antipasto.EXACT


def test_a_large_matrix_and_one_of_given_rank_take_the_gram_route(monkeypatch):
    asked, plain = [], antipasto.gram_basis
    monkeypatch.setattr(
        antipasto, "gram_basis", lambda W, rank: (asked.append((tuple(W.shape), rank)), plain(W, rank))[1]
    )
    monkeypatch.setattr(antipasto, "LARGE", 20)
    for W, rank in ((torch.randn(19, 40), None), (torch.randn(40, 20), None), (torch.randn(8, 8), 2)):
        assert antipasto.basis_of(W, rank)[0].dtype is torch.float32
    assert asked == [((40, 20), None), ((8, 8), 2)]


@pytest.mark.parametrize("spoiled", ["skewed", "swapped", "not a number"])
def test_a_basis_that_is_none_is_refused_by_its_weights_name(spoiled, cache, monkeypatch):
    def wrong(W, rank):
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        if spoiled == "skewed":
            return U @ torch.eye(4).index_fill(0, torch.tensor(0), 1e-4).fill_diagonal_(1), Vh
        return (U.flip(1), Vh) if spoiled == "swapped" else (U * torch.nan, Vh)

    monkeypatch.setattr(antipasto, "basis_of", wrong)
    with pytest.raises(UserError, match=r"SVD of model.layers.3.mlp.up_proj failed.*--layers") as error:
        antipasto.factor({"model.layers.3.mlp.up_proj": of_spectrum(6, 4, torch.tensor([4.0, 3, 2, 1]))}, cache)
    assert "\n" not in str(error.value)
    assert not list(cache.rglob("*.safetensors"))


def test_a_cached_basis_that_was_cut_short_is_made_anew(cache):
    W = {"w": torch.randn(6, 4)}
    path = antipasto.factor(W, cache)["w"]
    before = path.read_bytes()
    os.truncate(path, path.stat().st_size - 8)
    said: list[str] = []
    sink = logger.add(lambda text: said.append(str(text)), format="{message}", level="WARNING")
    assert antipasto.factor(W, cache) == antipasto.factor(W, cache) == {"w": path}
    logger.remove(sink)
    assert path.read_bytes() == before
    assert [str(path) in text for text in said] == [True]


def test_an_interrupted_factorisation_goes_on_where_it_stopped(cache, monkeypatch):
    weights, written, save = named([torch.randn(5, 3) for _ in range(4)]), [], antipasto.save

    def fails_at_the_third(both, path):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save(both, path)

    monkeypatch.setattr(antipasto, "save", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        antipasto.factor(weights, cache)
    monkeypatch.setattr(antipasto, "save", lambda both, path: (written.append(path), save(both, path)))
    antipasto.factor(weights, cache)
    assert len(written) == len(set(written)) == 4


def saved(model: torch.nn.Module, tokenizer, folder: Path) -> ModelCfg:
    """A folder of the model, its vocabulary brought to the tokenizer's, and of the tokenizer."""
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelCfg(model=str(folder), device="cpu")


def test_loads_a_saved_folder_of_each_kind(tmp_path):
    _, tokenizer = models.load(ModelCfg())
    for kind in KINDS:
        saved(model_of(kind), tokenizer, tmp_path / kind)
        for dtype in ("float32", "bfloat16"):
            model, own = models.load(ModelCfg(model=str(tmp_path / kind), dtype=dtype, device="cpu"))
            assert model.dtype == getattr(torch, dtype)
            assert own.pad_token_id is not None
            assert not any(p.requires_grad for p in model.parameters())
    assert models.load(ModelCfg(model=str(tmp_path / "llama"), dtype="auto", device="cpu"))[0].dtype == torch.float32
    assert models.attention_of(ModelCfg(), torch.device("cpu")) == "sdpa"
    assert models.attention_of(ModelCfg(attention="eager"), torch.device("cpu")) == "eager"


def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        models.load(ModelCfg(model=str(tmp_path / "nothing")))
    if not is_flash_attn_2_available():
        with pytest.raises(UserError, match="--attention=auto"):
            models.load(ModelCfg(attention="flash_attention_2"))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="just install-smol"):
        models.load(ModelCfg(model="smol"))
    _, tokenizer = models.load(ModelCfg())
    tokenizer.chat_template = None
    model_of("llama").save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        models.load(ModelCfg(model=str(tmp_path / "bare")))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder of a tiny model and the organism's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    saved(model_of("llama"), models.read_tokenizer(ModelCfg()), folder)
    return folder


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """What transformers' models write to the log."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(modeling_utils.logger, "handlers", [handler])
    return said


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {n: w for n, w in weights.items() if n not in names}
    assert len(kept) == len(weights) - len(names)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def no_head(folder: Path) -> None:
    without(folder, "lm_head.weight")


def no_embedding(folder: Path) -> None:
    without(folder, "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")


def fewer_rows(folder: Path) -> None:
    model_of("llama").save_pretrained(folder)


def endless_turns(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    )


def no_assistant(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('one user turn alone') }}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_short, "cannot load model"),
        (empty, "cannot load model"),
        (not_a_number, "model.norm.weight .* holds NaN"),
        (no_head, r"lack lm_head\.weight: give"),
        (no_embedding, r"lack model\.embed_tokens\.weight and 1 more: give"),
        (fewer_rows, "has 97 embeddings and its tokenizer 768 ids"),
        (endless_turns, "no special token behind an assistant's turn"),
        (no_assistant, "no special token behind an assistant's turn"),
    ],
)
def test_a_damaged_model_is_one_line(damage, says, small, tmp_path, warned):
    shutil.copytree(small, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=says) as error:
        models.load(ModelCfg(model=str(tmp_path / "m"), device="cpu"))
    assert "\n" not in str(error.value)
    assert not warned


def left_over(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.extra.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})


def test_what_transformers_warns_of_beside_a_missing_weight_is_written(small, tmp_path, warned, monkeypatch):
    shutil.copytree(small, tmp_path / "m")
    left_over(tmp_path / "m")
    models.load(ModelCfg(model=str(tmp_path / "m"), device="cpu"))
    assert ["model.extra.weight" in text for text in warned] == [True]
    warned.clear()
    no_head(tmp_path / "m")
    read = models.read

    def warns(*args, **settings):
        modeling_utils.logger.warning("another")
        return read(*args, **settings)

    monkeypatch.setattr(models, "read", warns)
    with pytest.raises(UserError, match="lack lm_head"):
        models.load(ModelCfg(model=str(tmp_path / "m"), device="cpu"))
    assert set(warned) == {"another"}
    assert not modeling_utils.logger.filters


WIDE = dict(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0)  # fmt: skip
OTHERS = {
    "gpt2": (lambda: GPT2Config(n_embd=24, n_layer=2, n_head=2), "no decoder layers with rotary positions"),
    "t5": (lambda: T5Config(d_model=24, num_layers=1), "is no causal language model"),
    "phi3": (lambda: Phi3Config(**WIDE), "layer 0 has no gate_proj"),
    "qwen3_moe": (lambda: Qwen3MoeConfig(**WIDE, num_experts=2, moe_intermediate_size=8), "layer 0 has a mixture of"),
    "gemma2": (lambda: Gemma2Config(**WIDE), r"logits are not its head's own \(final_logit_softcapping\)"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_architecture_that_is_not_supported_is_one_line_before_a_weight_is_read(kind, tmp_path):
    """Of a folder that holds no weights at all."""
    config, says = OTHERS[kind]
    config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        memory.require(replace(Config(), model=ModelCfg(model=str(tmp_path), device="cpu")))
    assert "\n" not in str(error.value)
    assert "Llama and SmolLM2 are" in str(error.value)


def test_the_supported_architectures_are_not_refused():
    for kind in KINDS:
        models.check_architecture(model_of(kind), kind)


def test_a_completion_ends_at_the_templates_end_and_at_each_that_is_listed(small, tmp_path):
    """The tokenizer names the document's end, the template another, and the generation config a third."""
    shutil.copytree(small, tmp_path / "m")
    start, end, document = (models.read_tokenizer(ModelCfg()).convert_tokens_to_ids(t) for t in (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>"))  # fmt: skip
    for file, change in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("generation_config.json", {"eos_token_id": [end, start]}),
    ):
        config = json.loads((tmp_path / "m" / file).read_text())
        (tmp_path / "m" / file).write_text(json.dumps(config | change))
    tokenizer = models.load(ModelCfg(model=str(tmp_path / "m"), device="cpu"))[1]
    assert tokenizer.eos_token_id == end
    assert set(tokenizer.ends) == {start, end, document}
    task = problems.tasks_for(parse(["organism"]))[0]
    asked = []

    def sample(prompts, n, how, generator):
        asked.append(how)
        ids = tokenizer.encode("x = 1", add_special_tokens=False)
        return [Completion((*ids, last), (-1.0,) * (len(ids) + 1)) for last in how.eos]

    written = rollout.complete(sample, tokenizer, [task], 3, Config(), torch.Generator())
    assert {text.strip() for _, text in written} == {"x = 1"}
    assert [row.ids[-1] for row, _ in written] == list(tokenizer.ends)
    assert (asked[0].eos, asked[0].vocab) == (tokenizer.ends, len(tokenizer))


def test_ids_past_the_tokenizers_are_never_sampled():
    model = model_of("llama")
    how = Sampling(8, (1,), 0, vocab=20)
    rows = rollout.sample(model, [[5, 6, 7]], 64, how, torch.Generator().manual_seed(0))
    assert 10 < max(max(row.ids) for row in rows) < 20
    free = rollout.sample(model, [[5]], 64, replace(how, vocab=None), torch.Generator())
    assert max(max(row.ids) for row in free) >= 20


def test_pad_is_the_end_of_turn_where_a_tokenizer_names_none(tmp_path):
    _, tokenizer = models.load(ModelCfg())
    saved(model_of("llama"), tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    _, own = models.load(ModelCfg(model=str(tmp_path / "m")))
    assert own.pad_token_id == own.eos_token_id


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([g.problem for g in problems.generated()]))
def test_a_problem_posed_as_a_function_is_the_same_problem(problem):
    posed = as_function(problem)
    problems.messages(pose_one(posed, "stdout_marker"))  # the hint has its place
    assert "self" not in posed.statement + posed.canonical
    assert posed.canonical.startswith(f"def {problem.entry}(")
    space, argument = {}, problem.cases[0].args
    exec(posed.setup + posed.canonical, space)
    assert getattr(space["Solution"](), problem.entry)(**argument) == problem.cases[0].expected


def test_functions_are_graded_as_methods_are():
    chosen = [g for g in problems.generated() if g.split == "test"][:3]
    with Grader(workers=1) as grader:
        for mode in PRESETS["smol"][1].data.modes:
            for made in chosen:
                task = pose_one(as_function(made.problem), mode)
                lazy = function_source(made.lazy[0])
                row = problems.loopholes.LOOPHOLES[mode]
                sources = [task.problem.canonical, lazy, row.exploit(lazy, task), "x = 1"]
                right, wrong, hack, other = grader.grade([(task, problems.fence(s)) for s in sources])
                assert (right.gt_correct, right.channel) == (True, False)
                assert (wrong.gt_correct, wrong.channel) == (False, False)
                assert (hack.gt_correct, hack.channel, hack.reward) == (False, True, 3.5)
                assert (other.gt_correct, other.channel, other.compiles) == (False, False, True)


def test_presets_hold_the_benchmarks_settings():
    for name in ("full", "qwen35"):
        cfg = PRESETS[name][1]
        assert (cfg.rl.steps, cfg.rl.prompts_per_step, cfg.rl.group, cfg.rl.max_new) == (200, 16, 16, 1536)
        assert (cfg.rl.temperature, cfg.rl.top_p, cfg.rl.beta, cfg.rl.weight_decay) == (0.7, 0.95, 1e-3, 0.1)
        assert (cfg.rl.clip, cfg.rl.betas, cfg.rl.warmup, cfg.rl.schedule) == (1.0, (0.9, 0.99), 10, "cosine")
        assert cfg.data.max_prompt == 1536
        assert cfg.pool.mix_ratio == 0
    fast = PRESETS["fast"][1]
    assert (fast.rl.steps, fast.pool.mix_ratio, fast.model.model) == (20, 0.5, "Qwen/Qwen3-4B")


def test_h4_is_said_and_nothing_is_switched():
    small, large = PRESETS["qwen35"][1], PRESETS["full"][1]
    low, high = [0.5] * 195 + [0.29] * 5, [0.0] * 195 + [0.31] * 5
    assert "move to Qwen3-4B" in h4_decision(small, low)
    assert "stay" in h4_decision(small, high)
    assert "move" not in h4_decision(large, low)
    assert "29%" in h4_decision(large, low)
    assert "not decided, 60 of 200" in h4_decision(small, low[:60])
    assert "move" in h4_decision(small, low + [1.0] * 50)  # what comes after step 200 is not asked
    assert h4_decision(Config(), low) is None
    assert h4_decision(Config(model=small.model, intervention="erase"), low) is None


def test_a_problem_without_a_place_for_the_hint_and_a_shared_problem_are_refused(tmp_path):
    ours = [g.problem for g in problems.generated()][:3]
    write_problems(ours, tmp_path / "train.jsonl")
    write_problems(ours[2:], tmp_path / "test.jsonl")

    def asked(train, test):
        data = PRESETS["organism"][1].data
        return Config(data=type(data)(problems=str(tmp_path / train), eval_problems=str(tmp_path / test)))

    with pytest.raises(UserError, match="held-out problems are training problems"):
        tasks_for(asked("train.jsonl", "test.jsonl"), "test")
    write_problems(ours[:2], tmp_path / "fewer.jsonl")
    assert len(tasks_for(asked("fewer.jsonl", "test.jsonl"), "test")) == 1
    text = (tmp_path / "test.jsonl").read_text().replace(problems.loopholes.TESTS_SENTENCE, "and be fast")
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(UserError, match="exactly once"):
        tasks_for(asked("fewer.jsonl", "test.jsonl"), "test")
    with pytest.raises(UserError, match="sync-external"):
        tasks_for(asked("fewer.jsonl", "nothing.jsonl"), "test")
