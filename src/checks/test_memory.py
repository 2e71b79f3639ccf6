"""The memory plan: against measured peaks, what its numbers depend on, and the refusal that names a flag."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3_5TextConfig, Qwen3Config
from transformers.integrations import sdpa_attention

from projected_grpo import memory
from projected_grpo.config import PRESETS, UserError

# the published configurations' numbers, see docs/gpu.md
QWEN3_4B = Qwen3Config(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
QWEN35_2B = Qwen3_5TextConfig(
    vocab_size=248320, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=8,
    num_key_value_heads=2, head_dim=256, tie_word_embeddings=True, linear_num_key_heads=16, linear_num_value_heads=16,
    linear_key_head_dim=128, linear_value_head_dim=128,
)  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_the_plan_agrees_with_measured_peaks_within_10_percent():
    """Three random models, in a fresh process whose allocator gives large blocks back at once."""
    blocks = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | blocks, capture_output=True, text=True, check=True
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 3
    ratios = {name: float(planned) / float(measured) for name, planned, measured in lines}
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


def preset(name: str):
    cfg = PRESETS[name][1]
    return replace(cfg, model=replace(cfg.model, device="cpu"))


def test_presets_fit_the_gpus_they_are_for():
    for name, config in (("fast", QWEN3_4B), ("full", QWEN3_4B), ("qwen35", QWEN35_2B)):
        for gb in (80, 96):
            assert memory.plan(preset(name), config).peak < memory.HEADROOM * gb * memory.GB


def test_parts_are_what_the_shapes_say():
    parts = {p.name: p.bytes for p in memory.plan(preset("full"), QWEN3_4B).parts}
    linears = 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
    assert parts["W' (merged weights)"] == 2 * linears
    assert parts["weights"] == pytest.approx(2 * (linears + 151936 * 2560), rel=1e-3)  # norms are the rest
    bases = 36 * (2 * 2560 * (2560 + 4096) + 2 * 1024 * (2560 + 1024) + 3 * 2560 * (2560 + 9728))
    assert parts["U and Vh"] == 2 * bases
    layer = 64 * 3072 * 2 * 8 * 128 * 2
    assert parts["key-value cache"] in ((36 + 1) * layer, (36 + 4) * layer)  # a layer's copy, or four: see below


def test_keys_and_values_are_copied_as_often_as_the_installed_attention_repeats_them(monkeypatch):
    """Once for each query head that shares them, where a turn's queries are not packed and a mask keeps them apart."""
    monkeypatch.setattr(sdpa_attention, "pack_gqa", None, raising=False)
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda mask, key, value: mask is None)
    cfg = preset("full")
    eager = replace(cfg, model=replace(cfg.model, attention="eager"))
    held = lambda cfg: {p.name: p.bytes for p in memory.plan(cfg, QWEN3_4B).parts}["key-value cache"]
    layer = 64 * 3072 * 2 * 8 * 128 * 2
    assert held(cfg) == (36 + 1) * layer
    assert held(eager) == (36 + 4) * layer
    monkeypatch.delattr(sdpa_attention, "pack_gqa")
    assert held(cfg) == (36 + 4) * layer
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda mask, key, value: True)
    assert held(cfg) == (36 + 1) * layer
    assert held(eager) == (36 + 4) * layer


def test_the_flags_that_a_plan_names_lower_it():
    cfg = preset("full")
    base = memory.plan(cfg, QWEN3_4B)
    for less in (
        replace(cfg, model=replace(cfg.model, svd_rank=256)),
        replace(cfg, model=replace(cfg.model, layers=(0.6, 0.75))),
        replace(cfg, model=replace(cfg.model, sample_rows=16)),
    ):
        assert memory.plan(less, QWEN3_4B).peak < base.peak
    whole = memory.plan(replace(cfg, model=replace(cfg.model, sample_rows=None)), QWEN3_4B)
    assert (whole.phase, whole.knob) == ("sampling", "--sample-rows")
    no_recompute = memory.plan(replace(cfg, model=replace(cfg.model, gradient_checkpointing=False)), QWEN3_4B)
    assert no_recompute.of("training") > 3 * base.of("training")


def test_lots_are_as_large_as_the_device_has_room_for():
    """On a GPU alone, and never over a number that was given."""
    cfg = preset("full")
    cfg = replace(cfg, model=replace(cfg.model, sample_rows=4))  # so that training decides
    for gb, tokens in ((80, 16384), (33, 8192), (31, 4096), (30, None)):
        chosen = memory.with_lots(cfg, QWEN3_4B, gb * memory.GB)
        assert chosen.rl.lot_tokens == tokens
        if tokens is not None:
            assert memory.plan(chosen, QWEN3_4B).peak <= memory.HEADROOM * gb * memory.GB
    given = replace(cfg, rl=replace(cfg.rl, lot_tokens=100))
    assert memory.with_lots(given, QWEN3_4B, 80 * memory.GB) is given
    assert memory.with_lots(cfg, QWEN3_4B) is cfg  # a CPU


def test_what_does_not_fit_is_refused_in_a_line_that_names_the_flag():
    cfg = replace(PRESETS["organism"][1], rl=replace(PRESETS["organism"][1].rl, group=1 << 14, max_new=2000))
    cfg = replace(cfg, model=replace(cfg.model, device="cpu"))
    with pytest.raises(UserError, match=r"needs [\d.]+ GB in sampling .* lower --sample-rows"):
        memory.require(cfg, device_gb=4)
    assert memory.require(PRESETS["organism"][1]).peak < memory.GB
