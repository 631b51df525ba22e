"""Teach a small Chinese model to reason about school mathematics: GRPO with five rule-based rewards on one GPU.

The R1 recipe (arXiv 2501.12948, GRPO: arXiv 2402.03300) as one flat file: edit the constants, run it, watch
`tensorboard --logdir output`. The main departures from the tutorial that it grew from (all of them: docs/recipe.md):
  1. Reasoning may run over any number of lines, and right answers alone are paid.
  2. 256 completions a step instead of 64, at a fifth of the learning rate, and every token of them counts the same.
  3. Completions of 512 tokens instead of 200, drawn from the policy itself: nothing narrows the sampling.
  4. Rewards are scaled over the batch: by group, one that differs in little would count as much as any other.
  5. Accuracy on held-out questions before, during and after, and alarms where the reward rises without it.

    python train_grpo.py                              # one CUDA GPU, Qwen2.5-0.5B-Instruct, Chinese GSM8K
    python train_grpo.py --model Qwen/Qwen2.5-0.5B    # R1-Zero: the same from the base model
    python train_grpo.py --demo                       # any laptop, no network: a tiny model learns the same in minutes
    python train_grpo.py --demo --model output/demo/base/untaught --output output/zero    # R1-Zero there
"""

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import prompts
from engine import demo, runs
from engine.console import UserError, refuse_missing_folder, run
from engine.constants import check_constants, constants_of, is_a
from rewards import REWARD_WEIGHTS, REWARDS, weights_fit

if TYPE_CHECKING:  # imported where it is used: `--help` and the one-line errors need no seconds to start
    from trl import GRPOConfig

# ----------------------------------------------------------------------------------------------------- the recipe
# The model and the questions
MODEL: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id or folder; --model
DATASET: str = "swulling/gsm8k_chinese"  # hub id or folder with splits train and test, or a file; --dataset
OUTPUT_DIR: str = "output/grpo"  # --output
SEED: int = 42  # weights of a new adapter, order of the questions, sampling; --seed

# One optimizer step
QUESTIONS_PER_STEP: int = 32  # distinct questions
COMPLETIONS_PER_QUESTION: int = 8  # the group: its mean is the baseline of every completion in it
MICRO_BATCH: int = 0  # completions per forward and GPU, 0: as many as fit; the step stays the same
GRADIENT_CHECKPOINTING: bool = True  # False: a fifth less arithmetic, 1.4 MiB more per token of a micro batch
BF16: bool = True  # autocast where the device has units for it; weights are float32 in any case. False: all float32
LEARNING_RATE: float = 1e-6  # peak; verl's for 256 completions a step, a fifth of the tutorial's
WARMUP_STEPS: int = 10  # then cosine to zero
ADAM_BETAS: tuple[float, float] = (0.9, 0.99)
WEIGHT_DECAY: float = 0.1
MAX_GRAD_NORM: float = 1.0
EPOCHS: float = 1.0  # passes over the training questions
MAX_STEPS: int = -1  # optimizer steps, -1: all of EPOCHS; --max-steps

# GRPO
BETA: float = 0.0  # weight of the KL term; above 0 the untrained model takes 2 GB more and reads every completion
# dapo: every token counts the same, in a long completion or a short one (arXiv 2503.14476)
LOSS_TYPE: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"] = "dapo"
# whose standard deviation divides the advantages; "group" blows up groups whose rewards hardly differ
SCALE_REWARDS: Literal["batch", "group", "none"] = "batch"

# Questions without a label
REWARD_MODEL: str = ""  # hub id or folder of a model that scores answers, to judge theirs; "": there are none
PREFERENCE_WEIGHT: float = 2.0  # of the rank in its group, from 0 to 1: the best earns what a right answer does

# Completions
MAX_PROMPT_TOKENS: int = 384  # longer training questions are dropped; the longest has 262, behind WORKED_EXAMPLE 386
MAX_COMPLETION_TOKENS: int = 512  # at 256 two thirds of the English answers in a public log are cut off
TEMPERATURE: float = 1.0  # 1 is on-policy: what is sampled is what is trained
FAST_ROLLOUT: bool = True  # the decode loop of rollout.py; False: TRL's own generation, slower

# LoRA
USE_LORA: bool = False  # True trains an adapter only: no optimizer state for the whole model
LORA_RANK: int = 16
LORA_ALPHA: int = 32
LORA_DROPOUT: float = 0.0
LORA_MODULES: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_LEARNING_RATE: float = 3e-5  # verl's for 320 completions a step; steps of 32 were measured at 1e-4

# Saving and watching
SAVE_EVERY: int = 25  # steps
SAVE_LIMIT: int = 3  # checkpoints kept; one of the 0.5B model is about 6 GB with its optimizer
SAMPLE_EVERY: int = 10  # steps between two completions shown in full
EVAL_EVERY: int = 25  # steps between two looks at the development questions; a new best is saved at once
# The last so many questions of the train split are not trained on. The curves and the best checkpoint look at them, the
# test split is asked before and after only. 200 give a standard error of 3.5 points.
DEV_QUESTIONS: int = 200
TEST_QUESTIONS: int = -1  # asked before and after, -1: the whole test split. On a CPU that takes half an hour each time
EVAL_BATCH: int = 0  # questions answered at a time, greedily; 0: as many as fit
PROBE_QUESTION: str = "5分钟多少秒"  # the question that the tutorial's model got wrong
REPORT_TO: str = "none"  # a tracker besides TensorBoard: "wandb", "swanlab", "trackio", "mlflow" ...


# ------------------------------------------------------------------------------------------- what becomes of them
def grpo_config(recipe: SimpleNamespace, on_cpu: bool, bf16: bool, accumulation: int) -> "GRPOConfig":
    """The constants under TRL's names, and the few settings that are no choice."""
    from trl import GRPOConfig

    weights = [*recipe.REWARD_WEIGHTS, recipe.PREFERENCE_WEIGHT] if recipe.REWARD_MODEL else recipe.REWARD_WEIGHTS
    config = GRPOConfig(
        **runs.common_arguments(recipe, on_cpu, bf16, accumulation),
        lr_scheduler_type="cosine",
        num_generations=recipe.COMPLETIONS_PER_QUESTION,
        max_completion_length=recipe.MAX_COMPLETION_TOKENS,
        temperature=recipe.TEMPERATURE,
        # off: generation_config.json would set them, and then another policy answers than the one that is trained
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        beta=recipe.BETA,
        loss_type=recipe.LOSS_TYPE,
        scale_rewards=recipe.SCALE_REWARDS,
        reward_weights=weights,
    )
    config._n_gpu = min(config.n_gpu, 1)  # without a launcher: one GPU, not DataParallel, which TRL refuses
    return config


# --------------------------------------------------------------------------------------------------- how a run goes
def default_recipe() -> dict[str, Any]:
    """The constants above, the rewards and their weights, and the prompt of a model that was not trained here."""
    edited = {"REWARDS": REWARDS, "REWARD_WEIGHTS": REWARD_WEIGHTS}
    edited |= {"SYSTEM_PROMPT": prompts.SYSTEM_PROMPT, "EXAMPLE": prompts.EXAMPLE}
    return constants_of(sys.modules[__name__]) | edited


def check_recipe(recipe: SimpleNamespace) -> None:
    """Raises UserError for the first constant of a wrong type or out of its range, or for what is not installed."""
    check_constants(vars(recipe), sys.modules[__name__])
    weights = recipe.REWARD_WEIGHTS
    if not (is_a(weights, list[float]) and weights_fit(weights)):
        raise UserError(
            f"REWARD_WEIGHTS = {weights!r} is not {len(REWARDS)} numbers of 0 or more, the language's at most a tenth "
            "of all there is to earn; mend it in rewards.py"
        )
    if recipe.REWARD_MODEL:
        refuse_missing_folder(recipe.REWARD_MODEL, "REWARD_MODEL")
    if recipe.BETA > 0 and not recipe.USE_LORA and Path(recipe.MODEL, "adapter_config.json").exists():
        raise UserError(  # TRL would load what the adapter was trained on as the untrained model of the KL term
            f"BETA = {recipe.BETA!r} with the adapter {recipe.MODEL!r}: set it to 0.0, or name the merged model"
        )
    if recipe.REPORT_TO != "none":
        from transformers.integrations import get_available_reporting_integrations

        if recipe.REPORT_TO not in get_available_reporting_integrations() or recipe.REPORT_TO == "tensorboard":
            raise UserError(
                f"REPORT_TO = {recipe.REPORT_TO!r} is no tracker that is installed here: pip install it, or set it to "
                '"none" (TensorBoard is written in any case)'
            )


def configure(argv: list[str] | None, constants: dict[str, Any]) -> tuple[Namespace, SimpleNamespace]:
    """The flags and the checked constants of this run. Raises UserError for what cannot be."""
    defaults = default_recipe()
    flags = runs.make_parser("GRPO on Chinese GSM8K", defaults).parse_args(argv)
    recipe = runs.make_recipe(defaults, constants, flags, demo.RECIPE)
    check_recipe(recipe)
    runs.check_folders(recipe, flags.demo)
    return flags, recipe


def main(argv: list[str] | None = None, **constants: Any) -> None:
    """Train. `constants` replace those above by name, for this run."""
    flags, recipe = configure(argv, constants)  # refuses what it can before anything is loaded, written or deleted
    output = Path(recipe.OUTPUT_DIR)

    from transformers import PrinterCallback

    from engine import checkpoints
    from engine.curves import read_history
    from engine.lora import lora_config
    from engine.memory import fit_batches
    from engine.models import check_positions, drop_long
    from engine.monitor import Monitor
    from engine.preference import load_preference
    from engine.questions import first_of, load_splits
    from engine.rollout import Rollout
    from engine.trainer import LeanGRPOTrainer

    state, autocast = runs.start_processes(flags, recipe.BF16)
    rows = recipe.QUESTIONS_PER_STEP * recipe.COMPLETIONS_PER_QUESTION // state.num_processes
    tokens = recipe.MAX_PROMPT_TOKENS + recipe.MAX_COMPLETION_TOKENS
    fit_batches(recipe, state.device, autocast is not None, tokens, rows, flags.resume)
    step = ("QUESTIONS_PER_STEP", "COMPLETIONS_PER_QUESTION")
    accumulation = runs.accumulation_steps(recipe, step, state.num_processes)
    checkpoint = runs.open_output(flags, recipe, state)

    # ---- data, model, trainer
    train, dev, test = load_splits(recipe.DATASET, recipe.DEV_QUESTIONS, unlabelled=recipe.REWARD_MODEL != "")
    test = first_of(test, recipe.TEST_QUESTIONS)
    runs.record_inputs(recipe, checkpoint, TRAIN=train, DEV=dev, TEST=test)
    model, tokenizer = runs.load_policy(recipe)
    limits = {name: getattr(recipe, name) for name in ("MAX_PROMPT_TOKENS", "MAX_COMPLETION_TOKENS")}
    check_positions(model, f"MODEL {recipe.MODEL!r}", **limits)
    fitting = drop_long(train, tokenizer, recipe.MAX_PROMPT_TOKENS, recipe.QUESTIONS_PER_STEP)
    rollout = Rollout(recipe.FAST_ROLLOUT)
    preference = [load_preference(recipe, state.device, autocast)] if recipe.REWARD_MODEL else []
    trainer = LeanGRPOTrainer(
        model=model,
        reward_funcs=recipe.REWARDS + preference,
        args=grpo_config(recipe, state.device.type == "cpu", autocast is not None, accumulation),
        train_dataset=fitting,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model),
        rollout_func=rollout,
    )
    trainer.remove_callback(PrinterCallback)  # it would print thirty keys a step
    checkpoints.check_disk(output, trainer.model, recipe.SAVE_LIMIT)

    # ---- before, train, save, after
    results = checkpoints.begin(output, recipe, checkpoint) if state.is_main_process else {}
    begun = checkpoints.step_of(checkpoint) if checkpoint else 0
    history = read_history(output, until=begun) if checkpoint else []
    monitor = Monitor(recipe, trainer, rollout, dev, test, begun, history)
    if state.is_main_process:
        monitor.print_header(dropped=len(train) - len(fitting))
    runs.train_and_measure(monitor, results, checkpoint)


if __name__ == "__main__":
    run(main)
