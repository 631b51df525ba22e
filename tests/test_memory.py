"""How many rows fit: by arithmetic, for the cards that people have."""

from types import SimpleNamespace

import pytest
import qwen
import torch
from transformers import Qwen2Config

from engine import memory
from engine.console import UserError
from engine.memory import Shape, choose_eval_batch, choose_micro_batch, fit_batches, row_bytes, shape_of, state_bytes

GIB = 2**30
RECIPE = SimpleNamespace(
    MODEL="Qwen/Qwen2.5-0.5B-Instruct",
    OUTPUT_DIR="nowhere",
    USE_LORA=False,
    LORA_RANK=16,
    LORA_MODULES=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    BETA=0.0,
    GRADIENT_CHECKPOINTING=True,
    MICRO_BATCH=0,
    EVAL_BATCH=0,
)
TOKENS, ROWS = 384 + 512, 256  # of train_grpo.py


def changed(**constants) -> SimpleNamespace:
    return SimpleNamespace(**vars(RECIPE) | constants)


@pytest.fixture(scope="module")
def shape() -> Shape:
    return shape_of(Qwen2Config(**qwen.SHAPE), RECIPE)


def test_shape(shape):
    """The published numbers of Qwen2.5-0.5B: 494 million weights, 358 million of them below the embedding."""
    assert shape.weights == 494_032_768 and round(shape.linear / 1e6) == 358
    assert shape.adapter == 16 * 24 * (2 * 896 + 2 * 1024 + 2 * 896 + 3 * (896 + 4864))  # q and o, k and v, the MLP
    assert (shape.hidden, shape.intermediate, shape.layers, shape.kv) == (896, 4864, 24, 128)


def test_known_figures(shape):
    """What was measured or counted elsewhere: 1.6 MiB a token without checkpointing, 12 KiB of cache a token."""
    assert row_bytes(shape, changed(GRADIENT_CHECKPOINTING=False), True, 1) / 2**20 == pytest.approx(1.6, rel=0.02)
    assert memory.cache_bytes(shape, True, 1) == 12288
    # weights, gradients and Adam's moments are 16 bytes a weight; the gradients are not held all the time
    assert state_bytes(shape, RECIPE, False) == 12 * shape.weights


@pytest.mark.parametrize(
    ("gib", "full", "lora"), [(8, None, 8), (12, None, 32), (16, 8, 32), (24, 32, 64), (40, 64, 64), (80, 64, 64)]
)
def test_cards(gib, full, lora, shape):
    """Rows of a micro batch for the cards that people have; where not one fits, LoRA is named."""
    assert choose_micro_batch(gib * GIB, shape, changed(USE_LORA=True), True, TOKENS, ROWS) == lora
    if full is None:
        with pytest.raises(UserError, match="set USE_LORA = True"):
            choose_micro_batch(gib * GIB, shape, RECIPE, True, TOKENS, ROWS)
    else:
        assert choose_micro_batch(gib * GIB, shape, RECIPE, True, TOKENS, ROWS) == full
    assert choose_micro_batch(141 * GIB, shape, RECIPE, True, TOKENS, ROWS) == 64


def test_what_is_chosen_fits(shape):
    """The chosen rows leave the reserve free, one more divisor of the step would not; more memory never gives fewer."""
    before = 0
    for gib in range(16, 60):
        rows = choose_micro_batch(gib * GIB, shape, RECIPE, True, TOKENS, 240)
        assert 240 % rows == 0 and rows >= before
        before = rows
        held = state_bytes(shape, RECIPE, True) + rows * row_bytes(shape, RECIPE, True, TOKENS)
        assert held < 0.8 * gib * GIB
    for constants in ({"BETA": 0.04}, {"GRADIENT_CHECKPOINTING": False}):
        pairs = [
            [
                choose_micro_batch(gib * GIB, shape, recipe, True, TOKENS, ROWS)
                for recipe in (changed(**constants), RECIPE)
            ]
            for gib in range(20, 40)
        ]
        assert all(less <= most for less, most in pairs) and any(less < most for less, most in pairs)
    assert choose_micro_batch(24 * GIB, shape, RECIPE, False, TOKENS, ROWS) < 32  # float32


def test_eval_batch(shape):
    """A power of two that fits beside what training holds; at least one question, at most 256."""
    held = state_bytes(shape, RECIPE, True)
    chosen = [choose_eval_batch(gib * GIB, held, shape, True, TOKENS) for gib in (4, 10, 12, 24, 80)]
    assert chosen == sorted(chosen) and chosen[0] == 1 and chosen[-1] == 256
    assert all(count & (count - 1) == 0 for count in chosen)


def test_on_a_cpu(tmp_path):
    """A fixed small number that divides the step; a given number is taken as it is; --resume takes the run's own."""
    cpu = torch.device("cpu")
    recipe = changed(OUTPUT_DIR=str(tmp_path))
    fit_batches(recipe, cpu, False, TOKENS, 6, resume=False)
    assert (recipe.MICRO_BATCH, recipe.EVAL_BATCH) == (3, 128)
    recipe = changed(MICRO_BATCH=5, OUTPUT_DIR=str(tmp_path))
    fit_batches(recipe, cpu, False, TOKENS, 256, resume=False)
    assert (recipe.MICRO_BATCH, recipe.EVAL_BATCH) == (5, 128)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/recipe.json").write_text('{"SYSTEM_PROMPT": "", "MICRO_BATCH": 2, "EVAL_BATCH": 32}')
    recipe = changed(OUTPUT_DIR=str(tmp_path))
    fit_batches(recipe, cpu, False, TOKENS, 256, resume=True)
    assert (recipe.MICRO_BATCH, recipe.EVAL_BATCH) == (2, 32)


def test_on_a_gpu(tmp_path, monkeypatch, capsys):
    """What the card has free decides, before a weight is loaded; a note says how much that is."""
    Qwen2Config(**qwen.SHAPE).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * GIB, 24 * GIB))
    recipe = changed(MODEL=str(tmp_path), OUTPUT_DIR=str(tmp_path))
    fit_batches(recipe, torch.device("cuda", 0), True, TOKENS, ROWS, resume=False)
    assert (recipe.MICRO_BATCH, recipe.EVAL_BATCH) == (32, 256)
    assert "25.8 GB of GPU memory are free" in capsys.readouterr().out
