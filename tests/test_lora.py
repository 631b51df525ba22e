"""Frozen weights below an adapter are cast once: the same bits are computed, and the merge starts in full precision."""

import json

import pytest
import torch
from conftest import run_main
from safetensors.torch import load_file
from test_trainer import LONGEST, train

import evaluate
import train_grpo
from engine import lora, trainer
from engine.console import UserError
from engine.rollout import Sampler
from engine.trainer import LeanGRPOTrainer

BF16 = {"lora": True, "bf16": True, "beta": 0.1, "max_completion_length": LONGEST}


def test_the_same_bits_as_with_casts(tmp_path, monkeypatch):
    """Weights cast once give the gradients and the log of weights that autocast casts in every pass, bit by bit."""
    lowered = train(LeanGRPOTrainer, tmp_path, **BF16)
    dtypes = {name: weight.dtype for name, weight in lowered.model.named_parameters()}
    low = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert len(low) > 10 and all("proj" in name and "lora" not in name for name in low)
    assert all(dtypes[name] == torch.float32 for name in dtypes.keys() - low)  # embedding, norms, adapters
    monkeypatch.setattr(trainer, "lower_frozen", lambda *_: None)
    cast = train(LeanGRPOTrainer, tmp_path, **BF16)
    assert {weight.dtype for weight in cast.model.parameters()} == {torch.float32}
    for mine, its in zip(lowered.gradients, cast.gradients, strict=True):
        assert any(grad.abs().max() > 1e-3 for grad in its.values())
        assert all(torch.equal(mine[name], grad) for name, grad in its.items())
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [[{k: v for k, v in row.items() if k not in timed} for row in t.state.log_history] for t in (lowered, cast)]
    assert logs[0] == logs[1]


def test_the_sampler_shares_them(tmp_path):
    """The tensors that the trainer holds in low precision are the sampler's own, without a copy."""
    lowered = train(LeanGRPOTrainer, tmp_path, **BF16)
    sampler = Sampler(lowered.model, lowered.processing_class, torch.bfloat16)
    sampler.generate([[5, 6, 7]], 3)
    trained = {weight.data_ptr() for weight in lowered.model.parameters() if weight.dtype == torch.bfloat16}
    shadow = {weight.data_ptr() for weight in sampler.shadow.parameters()}
    assert trained <= shadow
    assert all("lora" in name or "lm_head" in name for name in names_copied(sampler, lowered.model))


def names_copied(sampler: Sampler, model: torch.nn.Module) -> list[str]:
    """The weights of the model that the sampler holds a copy of."""
    names = {weight.data_ptr(): name for name, weight in model.named_parameters(remove_duplicate=False)}
    return [names[source.data_ptr()] for _, source in sampler.copies]


@pytest.fixture
def bf16_units(monkeypatch):
    """A CPU that says that it multiplies bf16 itself, so that a run autocasts."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def test_a_run_merges_in_full_precision(bf16_units, demo_base, demo_output):
    """Stopped and resumed, the saved model is base plus adapter in float32, and evaluate.py repeats `after`."""
    flags = ["--demo", "--cpu", "--output", demo_output]
    constants = {"USE_LORA": True, "BF16": True, "QUESTIONS_PER_STEP": 4, "MICRO_BATCH": 8, "SAVE_EVERY": 1}
    constants |= {"LORA_LEARNING_RATE": 1e-3, "DEV_QUESTIONS": 8, "MAX_COMPLETION_TOKENS": 32}
    run_main(train_grpo.main, *flags, "--max-steps", 1, **constants)
    run_main(train_grpo.main, *flags, "--max-steps", 2, "--resume", **constants)
    base = load_file(demo_base / "model" / "model.safetensors")
    merged = load_file(demo_output / "model.safetensors")
    adapter = load_file(demo_output / "adapter" / "adapter_model.safetensors")
    scale = train_grpo.LORA_ALPHA / train_grpo.LORA_RANK
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert b.abs().max() > 0 and merged[f"{name}.weight"].dtype == torch.float32
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + scale * b @ a, rtol=0, atol=1e-7)
    evaluate.main([str(demo_output), "--cpu", "--output", str(demo_output / "again")])
    after = json.loads((demo_output / "results.json").read_text())["after"]
    assert json.loads((demo_output / "again" / "eval.json").read_text()) == after


def test_other_weights_in_the_place_of_the_base_are_refused(tmp_path):
    """A base that was trained again while the run went would get an adapter that is not its own."""
    lowered = train(LeanGRPOTrainer, tmp_path, **BF16)
    with pytest.raises(UserError, match="other weights than when the run began"):
        lora.restore_frozen(lowered.model, str(tmp_path / "model"), "1 files, sha256 0")
    whole = load_model_of(tmp_path)
    lora.restore_frozen(whole, "nowhere", None)  # without an adapter there is nothing to restore


def load_model_of(folder) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
