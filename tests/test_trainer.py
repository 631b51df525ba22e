"""The training half computes less than TRL's and yields the same gradient, whatever the loss and the settings.

Both train a tiny Qwen2 in float32 on the same fixed completions of mixed length, half of the groups flat, and their
gradients are compared as the optimizer gets them. Whole checkpoints are tested in test_checkpoints.py.
"""

import math
import os
import random
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from conftest import run_two_processes
from datasets import Dataset
from peft import LoraConfig
from test_rollout import EOS, make_model, make_tokenizer
from transformers import Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTTrainer

from engine.trainer import CPU_TILE, LeanGRPOTrainer, LeanSFTTrainer, exact_products, lean_lm_head

GROUP, LONGEST = 4, 24


class Replay:
    """A rollout of fixed completions, 1 to LONGEST tokens; both trainers ask for the same ones in the same order."""

    def __init__(self) -> None:
        self.draw = random.Random(int(os.environ.get("RANK", 0)))

    def __call__(self, prompts, trainer):
        rows = [[self.draw.randrange(2, 32) for _ in range(self.draw.randrange(LONGEST))] + [EOS] for _ in prompts]
        encoded = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)
        return {"prompt_ids": encoded["input_ids"], "completion_ids": rows, "logprobs": None}


def half_flat(prompts, completion_ids, **_) -> list[float]:
    """Rewards that differ within the groups of every second question."""
    numbers = [int(prompt[0]["content"].split()[0][1:]) for prompt in prompts]
    return [0.5 if n % 2 else sum(ids) % 7 / 4 for n, ids in zip(numbers, completion_ids, strict=True)]


def no_flat(completion_ids, **_) -> list[float]:
    return [sum(ids) % 7 / 4 for ids in completion_ids]


def all_flat(completion_ids, **_) -> list[float]:
    return [0.5] * len(completion_ids)


class Keep(TrainerCallback):
    """A copy of all gradients before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        self.steps.append({name: grad.clone() for name, grad in grads.items()})  # None, and the optimizer would skip it


def train(
    kind: type[GRPOTrainer], folder, reward=half_flat, lora: bool = False, prompt_words: int | None = None, **settings
):
    """Train two steps, by default; the trainer, with `.gradients` of each step and `.computed` (rows, columns)."""
    make_model(initializer_range=0.15).save_pretrained(folder / "model")  # a reference model is loaded from there
    model = Qwen2ForCausalLM.from_pretrained(folder / "model")
    words = [3 * i % 8 if prompt_words is None else prompt_words + i % 5 for i in range(32)]
    questions = [{"prompt": [{"role": "user", "content": f"w{i} " + "w5 " * words[i]}]} for i in range(2, 32)]
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": GROUP}
    defaults |= {"max_completion_length": LONGEST, "max_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 0.0}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    defaults |= {"use_cpu": True, "bf16": False, "beta": 0.0, "activation_checkpointing": False}
    trainer = kind(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(str(folder), **defaults | settings),
        train_dataset=Dataset.from_list(questions),
        processing_class=make_tokenizer(),
        rollout_func=Replay(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False) if lora else None,
        callbacks=[keep := Keep()],
    )
    trainer.computed, trainer.gradients = [], keep.steps
    body = trainer.accelerator.unwrap_model(trainer.model)
    body = (body.get_base_model() if lora else body).model
    body.register_forward_pre_hook(
        lambda module, args, kwargs: trainer.computed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    trainer.train()
    return trainer


def assert_same_gradients(ours: GRPOTrainer, stock: GRPOTrainer) -> None:
    assert len(ours.gradients) == len(stock.gradients) > 0
    largest = [max(grad.abs().max().item() for grad in step.values()) for step in stock.gradients]
    assert max(largest) > 1e-3, "nothing to compare"
    for mine, its, size in zip(ours.gradients, stock.gradients, largest, strict=True):
        assert mine.keys() == its.keys()
        for name, grad in its.items():
            torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5 * size, msg=name)


def tokens(trainer: GRPOTrainer) -> int:
    return sum(rows * columns for rows, columns in trainer.computed)


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
CASES = {loss: {"loss_type": loss} for loss in LOSSES}
CASES |= {f"{loss}, KL": {"loss_type": loss, "beta": 0.1} for loss in LOSSES}
CASES |= {
    "one micro batch": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "no accumulation": {"gradient_accumulation_steps": 1, "max_steps": 4},
    "LoRA": {"lora": True},
    "LoRA, KL": {"lora": True, "beta": 0.1},
    "checkpointing": {"activation_checkpointing": True},
    "LoRA, checkpointing": {"lora": True, "activation_checkpointing": True},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "two iterations, bnpo": {"num_iterations": 2, "max_steps": 4, "loss_type": "bnpo"},
    "two iterations, vespo, KL": {"num_iterations": 2, "max_steps": 4, "loss_type": "vespo", "beta": 0.1},
    "generation for two steps": {"steps_per_generation": 8},
    "generation for half a step": {"steps_per_generation": 2},
    "generation and steps misaligned": {"steps_per_generation": 6, "max_steps": 3},
    "entropy bonus": {"entropy_coef": 0.1},
    "high-entropy tokens": {"top_entropy_quantile": 0.5},
    "sequence level": {"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 4},
    "sequence level, luspo": {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2, "max_steps": 4},
    "cut-off ones masked": {"mask_truncated_completions": True, "max_completion_length": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_stock(tmp_path, case):
    """The gradient of every parameter in every step is TRL's, and fewer tokens are computed for it."""
    stock, ours = (train(kind, tmp_path, **CASES[case]) for kind in (GRPOTrainer, LeanGRPOTrainer))
    assert_same_gradients(ours, stock)
    assert tokens(ours) < tokens(stock)


class Alone(LeanGRPOTrainer):
    """Without shared prompts: trimmed, sorted and skipped rows."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shares_prompts = False


class Sorted(Alone):
    """Without skipping besides."""

    def _teaches(self, inputs):
        return torch.ones_like(inputs["advantages"], dtype=torch.bool)


class Trimmed(Alone):
    """Trimming alone."""

    _prepare_inputs, _compute_loss = GRPOTrainer._prepare_inputs, GRPOTrainer._compute_loss


def test_each_lever_saves(tmp_path):
    """Trimming, sorting, skipping and sharing each compute less than without."""
    kinds = (GRPOTrainer, Trimmed, Sorted, Alone, LeanGRPOTrainer)
    stock, trimmed, ordered, alone, ours = (train(kind, tmp_path, max_steps=4, prompt_words=12) for kind in kinds)
    for trainer in (trimmed, ordered, alone, ours):
        assert_same_gradients(trainer, stock)
    computed = [tokens(trainer) for trainer in (stock, trimmed, ordered, alone, ours)]
    assert all(less < 0.95 * more for more, less in zip(computed, computed[1:], strict=False)), computed
    rows = [sum(rows for rows, _ in trainer.computed) for trainer in (stock, ordered, alone)]
    assert rows[0] == rows[1] == 64 and 16 < rows[2] < 48


def test_only_labelled_positions_are_projected(tmp_path, monkeypatch):
    """Prompts and padding do not meet the LM head, which on a CPU TRL would let them do."""
    projected, apply = [], trl.trainer.utils._ChunkedLogProbFunction.apply
    head = SimpleNamespace(apply=lambda hidden, *rest: projected.append(len(hidden)) or apply(hidden, *rest))
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", head)
    trainer = train(LeanGRPOTrainer, tmp_path, reward=no_flat, max_steps=1)
    lengths = [step["completions/mean_length"] for step in trainer.state.log_history if "reward" in step]
    assert sum(projected) == 16 * lengths[0]


def test_dead_micro_batches_are_left_out(tmp_path):
    """In a step of flat groups the model runs once, on one row, for its gradients of zeros; entropy is not logged."""
    trainer = train(LeanGRPOTrainer, tmp_path, reward=all_flat, max_steps=1)
    assert trainer.computed == [(1, 2)]
    assert all(grad.eq(0).all() for grad in trainer.gradients[0].values())
    logged = trainer.state.log_history[0]
    assert logged["entropy"] is None and logged["loss"] == logged["grad_norm"] == logged["clip_ratio/region_mean"] == 0


def test_figures_are_of_live_rows(tmp_path):
    """Entropy is a mean over micro batches with live rows, never diluted by zeros; nothing becomes NaN."""
    stock, ours = (train(kind, tmp_path, max_steps=4) for kind in (GRPOTrainer, LeanGRPOTrainer))
    for its, mine in zip(stock.state.log_history[:4], ours.state.log_history[:4], strict=True):
        assert its.keys() == mine.keys() and all(math.isfinite(value) for value in mine.values())
        assert mine["entropy"] == pytest.approx(its["entropy"], rel=0.1) and mine["entropy"] > 1
        assert mine["loss"] == pytest.approx(its["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-4)


# A large epsilon, else Adam makes a whole step of a rounding error where a gradient is almost nothing.
DECAYING = {"weight_decay": 0.5, "learning_rate": 1e-2, "adam_epsilon": 1e-3}


def test_flat_steps_still_decay(tmp_path):
    """After a step of flat groups alone the weights are TRL's too: Adam's momentum and the weight decay act on."""
    weights = []
    for kind in (GRPOTrainer, LeanGRPOTrainer):
        rewards = iter([no_flat, all_flat, all_flat])  # by step

        def reward(completion_ids, rewards=rewards, **_):
            return next(rewards)(completion_ids)

        trainer = train(kind, tmp_path, reward=reward, max_steps=3, **DECAYING)
        assert trainer.state.log_history[2]["grad_norm"] == 0
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


WRONG = {  # what is done -> settings under which it changes the gradient, the method it changes, to what
    "live rows are skipped": ({}, "_teaches", lambda self, inputs: inputs["advantages"] > 0),
    "rows with a KL term are skipped": ({"beta": 0.1}, "_teaches", lambda self, inputs: inputs["advantages"] != 0),
    "bnpo is sorted": ({"loss_type": "bnpo", "beta": 0.1}, "_rows_are_independent", lambda self: True),
    "bnpo is skipped": ({"loss_type": "bnpo"}, "_teaches", lambda self, inputs: inputs["advantages"] != 0),
    "an entropy bonus is sorted": ({"entropy_coef": 0.1, "beta": 0.1}, "_rows_are_independent", lambda self: True),
    "a quantile is sorted": ({"top_entropy_quantile": 0.5, "beta": 0.1}, "_rows_are_independent", lambda self: True),
}


@pytest.mark.parametrize("what", WRONG)
def test_comparison_notices(tmp_path, what):
    """Negative controls: wherever a lever would be wrong, the comparison above fails."""
    settings, method, wrong = WRONG[what]
    stock = train(GRPOTrainer, tmp_path, **settings)
    ours = train(type("Wrong", (LeanGRPOTrainer,), {method: wrong}), tmp_path, **settings)
    with pytest.raises(AssertionError):
        assert_same_gradients(ours, stock)


def test_sorting_stays_within_a_step(tmp_path, monkeypatch):
    """Negative control: sorted over all steps of a generation, rows would train in another step."""
    stock = train(GRPOTrainer, tmp_path, steps_per_generation=8)
    monkeypatch.setattr("engine.trainer.math.gcd", lambda parts, accumulation: parts)
    with pytest.raises(AssertionError):
        assert_same_gradients(train(LeanGRPOTrainer, tmp_path, steps_per_generation=8), stock)


def test_other_passes_are_left_to_trl(tmp_path, monkeypatch):
    """A pass that asks for more than log-probabilities and entropies goes to TRL as it came."""
    trainer = train(LeanGRPOTrainer, tmp_path, max_steps=1)
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", lambda self, *args, **kwargs: (args, kwargs))
    ids = torch.ones(2, 5, dtype=torch.long)
    args, kwargs = trainer._get_per_token_logps_and_entropies(None, ids, ids, 3, compute_aux_loss=True, num_images=None)
    assert args[:4] == (None, ids, ids, 3) and kwargs == {"compute_aux_loss": True, "num_images": None}


def compare_a_rank(folder) -> None:
    """One of two processes, of which the second has flat groups only: its gradients and weights against TRL's."""
    rank = int(os.environ["RANK"])
    settings = {"reward": all_flat if rank else no_flat, "gradient_accumulation_steps": 2, "max_steps": 3}
    settings |= DECAYING | {"ddp_find_unused_parameters": False}
    stock, ours = (train(kind, folder / f"rank{rank}", **settings) for kind in (GRPOTrainer, LeanGRPOTrainer))
    assert_same_gradients(ours, stock)
    for mine, its in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert ours.computed == [(1, 2)] * 6 if rank else tokens(ours) < tokens(stock)
    torch.distributed.barrier()


def test_two_ranks_one_flat(tmp_path):
    """Under DDP a process with flat groups only keeps step with the other one, and both get TRL's weights."""
    assert run_two_processes(compare_a_rank, tmp_path) == [0, 0]


def test_no_other_training_is_changed():
    """TRL's LM head is switched over within our forward only: whoever trains besides us, rounds as before."""
    from trl.kernels.chunked_logprob import _use_triton

    utils, cpu = trl.trainer.utils, torch.device("cpu")
    tile = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with lean_lm_head(cpu):
        assert utils._use_triton(cpu) and utils._CHUNKED_LOGPROB_CHUNK_SIZE == CPU_TILE < tile
    with lean_lm_head(torch.device("cuda")):
        assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == tile  # its kernel wants the large ones
    assert utils._use_triton is _use_triton and not _use_triton(cpu) and utils._CHUNKED_LOGPROB_CHUNK_SIZE == tile


@pytest.mark.parametrize("labelled_only", [True, False])
def test_small_tiles_change_nothing(labelled_only):
    """Log-probabilities, entropies and gradients of a vocabulary of several tiles are those of TRL's large ones."""
    vocabulary, made = 3 * CPU_TILE + 5, []
    for device in ("cuda", "cpu"):  # only the CPU's tiles are small; nothing runs on the device
        model = make_model(vocab_size=vocabulary)
        trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        ids = torch.arange(27).reshape(3, 9) * 997 % vocabulary
        with lean_lm_head(torch.device(device), labelled_only):
            done = model(input_ids=ids, labels=ids.masked_fill(ids % 3 == 0, -100), fused_lm_head=True)
        done.loss.backward()
        made.append([done.log_probs, done.entropy, *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-6)


def test_fine_tuning_computes_small_tiles_too(monkeypatch):
    utils = trl.trainer.utils
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self: (utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton))
    trainer = LeanSFTTrainer.__new__(LeanSFTTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    assert trainer.compute_loss() == (CPU_TILE, utils._use_triton)


def test_the_heads_gradients_are_exact_on_units_for_bf16():
    """Sums of products of bf16 numbers are as exact as in float32, and other numbers are left to TRL's own function.

    Rounded to bf16 by themselves, as a plain product of these matrices is, they would be a thousand times further off.
    """
    kernels, torch_settings = trl.kernels.chunked_logprob, torch.backends.mkldnn.matmul
    before = kernels._addmm_fp32, torch_settings.fp32_precision
    torch.manual_seed(0)
    a, b = torch.randn(300, 1024).bfloat16(), torch.randn(1024, 96).bfloat16()
    exact = a.double() @ b.double()
    with exact_products():
        total = torch.zeros(300, 96)
        kernels._addmm_fp32(total, a, b)
        assert torch_settings.fp32_precision == before[1]
        single = torch.zeros(300, 96)
        kernels._addmm_fp32(single, a.float() / 3, b.float())
    assert (kernels._addmm_fp32, torch_settings.fp32_precision) == before
    assert (total - exact).abs().max() < 1e-6 * exact.abs().max()
    assert torch.equal(single, torch.zeros(300, 96).addmm_(a.float() / 3, b.float()))
    assert ((a @ b).double() - exact).abs().max() > 1e-3 * exact.abs().max()
