"""Teach a small Chinese model to reason about school mathematics: GRPO with five rule-based rewards on one GPU.

The R1 recipe (arXiv 2501.12948, GRPO: arXiv 2402.03300) as one flat file: edit the constants, run it, watch
`tensorboard --logdir output`. The main departures from the tutorial that it grew from (all of them: docs/recipe.md):
  1. Reasoning may run over any number of lines, and a right answer earns three quarters of all there is to earn.
  2. 256 completions a step instead of 64, at a fifth of the learning rate, and every token of them counts the same.
  3. Completions of 512 tokens instead of 200, drawn from the policy itself: nothing narrows the sampling.
  4. Rewards are scaled over the batch, so that a group which differs in format only is not blown up.
  5. Accuracy on held-out questions before, during and after, and alarms where the reward rises without it.

    python train_grpo.py                              # one CUDA GPU, Qwen2.5-0.5B-Instruct, Chinese GSM8K
    python train_grpo.py --model Qwen/Qwen2.5-0.5B    # R1-Zero: the same from the base model
    python train_grpo.py --demo                       # any laptop, no network: a tiny model learns the same in minutes
    python train_grpo.py --demo --model output/demo/base/untaught --output output/zero    # R1-Zero there
"""

import argparse
import importlib.util
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

from engine import demo, pretraining
from engine.console import UserError, check_ranges, check_types, constants_of, is_a, refuse_missing_folder, run
from engine.folder import lock
from engine.questions import load_questions
from rewards import REWARD_WEIGHTS, REWARDS, weights_fit

if TYPE_CHECKING:  # imported where they are used: `--help` and the one-line errors need no seconds to start
    import torch
    from accelerate import PartialState
    from peft import LoraConfig
    from transformers import PreTrainedModel
    from trl import GRPOConfig

    from engine.monitor import Watch

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before any of these libraries is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks helps nobody here
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)  # what these libraries tell each other about renamed options

# ----------------------------------------------------------------------------------------------------- the recipe
# The model and the questions
MODEL: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id or folder; --model
DATASET: str = "swulling/gsm8k_chinese"  # hub id or folder with splits train and test; --dataset
OUTPUT_DIR: str = "output"  # --output
SEED: int = 42  # weights of a new adapter, order of the questions, sampling; --seed

# One optimizer step
QUESTIONS_PER_STEP: int = 32  # distinct questions
COMPLETIONS_PER_QUESTION: int = 8  # the group: its mean is the baseline of every completion in it
MICRO_BATCH: int = 16  # completions per forward and GPU; halve it if out of memory, the step stays the same
GRADIENT_CHECKPOINTING: bool = True  # False: a fifth less arithmetic, 1.6 MiB more per token of a micro batch
BF16: bool = True  # autocast where the device has units for it; weights are float32 in any case. False: all float32
LEARNING_RATE: float = 1e-6  # peak; the tutorial's 5e-6 went wrong at about step 200
WARMUP_STEPS: int = 10  # then cosine to zero
ADAM_BETAS: tuple[float, float] = (0.9, 0.99)
WEIGHT_DECAY: float = 0.1
MAX_GRAD_NORM: float = 1.0
EPOCHS: float = 1.0  # passes over the training questions
MAX_STEPS: int = -1  # optimizer steps, -1: all of EPOCHS; --max-steps

# GRPO
BETA: float = 0.0  # weight of the KL term to the untrained model, which then takes 2 GB and a forward of every row
# dapo: every token counts the same, in a long completion or a short one (arXiv 2503.14476)
LOSS_TYPE: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"] = "dapo"
# whose deviation divides advantages; "group" blows up groups that differ in format only
SCALE_REWARDS: Literal["batch", "group", "none"] = "batch"

# Questions without a label
REWARD_MODEL: str = ""  # hub id or folder of a model that scores answers, to judge theirs; "": there are none
PREFERENCE_WEIGHT: float = 6.0  # of the rank in its group, from 0 to 1: the best earns what a right answer does

# Completions
MAX_PROMPT_TOKENS: int = 384  # longer training questions are dropped; the longest has 262, behind WORKED_EXAMPLE 386
MAX_COMPLETION_TOKENS: int = 512  # at 256 more than half of this model's answers are cut off
TEMPERATURE: float = 1.0  # 1 is on-policy: what is sampled is what is trained
FAST_ROLLOUT: bool = True  # the decode loop of rollout.py; False: TRL's own generation, slower
USE_VLLM: bool = False  # vLLM instead, on the same GPU; it is not in requirements.txt

# LoRA
USE_LORA: bool = False  # True trains an adapter only: no optimizer state for the whole model
LORA_RANK: int = 16
LORA_ALPHA: int = 32
LORA_DROPOUT: float = 0.0
LORA_MODULES: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_LEARNING_RATE: float = 1e-5  # an adapter wants about ten times the rate of the whole model

# Saving and watching
SAVE_EVERY: int = 25  # steps
SAVE_LIMIT: int = 3  # checkpoints kept; one of the 0.5B model is about 6 GB with its optimizer
SAMPLE_EVERY: int = 10  # steps between two completions shown in full
EVAL_EVERY: int = 25  # steps between two looks at held-out accuracy; a new best is saved at once
EVAL_QUESTIONS: int = 200  # test questions, always the same, answered at each look: 3.5 points standard error
EVAL_BATCH: int = 128  # questions answered at a time, greedily
PROBE_QUESTION: str = "5分钟多少秒"  # the question that the tutorial's model got wrong
REPORT_TO: str = "none"  # a tracker besides TensorBoard: "wandb", "swanlab", "trackio", "mlflow" ...


# ------------------------------------------------------------------------------------------- what becomes of them
def grpo_config(recipe: SimpleNamespace, on_cpu: bool, bf16: bool, accumulation: int) -> "GRPOConfig":
    """The constants under TRL's names, and the few settings that are no choice."""
    from trl import GRPOConfig

    weights = [*recipe.REWARD_WEIGHTS, recipe.PREFERENCE_WEIGHT] if recipe.REWARD_MODEL else recipe.REWARD_WEIGHTS
    config = GRPOConfig(
        **common_arguments(recipe, on_cpu, bf16, accumulation),
        lr_scheduler_type="cosine",
        num_generations=recipe.COMPLETIONS_PER_QUESTION,
        max_completion_length=recipe.MAX_COMPLETION_TOKENS,
        temperature=recipe.TEMPERATURE,
        top_p=1.0,  # neutral, and said: the model's own generation_config.json would narrow the sampling, and then
        top_k=0,  # the policy that is trained is not the one that sampled
        repetition_penalty=1.0,
        beta=recipe.BETA,
        loss_type=recipe.LOSS_TYPE,
        scale_rewards=recipe.SCALE_REWARDS,
        use_vllm=recipe.USE_VLLM,
        vllm_mode="colocate",
        reward_weights=weights,
    )
    config._n_gpu = min(config.n_gpu, 1)  # without a launcher: one GPU, not DataParallel, which TRL refuses
    return config


def common_arguments(recipe: SimpleNamespace, on_cpu: bool, bf16: bool, accumulation: int) -> dict:
    """Those of them that any of TRL's trainers takes; train_sft.py has the same constants for them."""
    return {
        "output_dir": recipe.OUTPUT_DIR,
        "seed": recipe.SEED,
        "use_cpu": on_cpu,
        "bf16": bf16,
        "per_device_train_batch_size": recipe.MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "activation_checkpointing": recipe.GRADIENT_CHECKPOINTING,
        "learning_rate": recipe.LORA_LEARNING_RATE if recipe.USE_LORA else recipe.LEARNING_RATE,
        "warmup_steps": recipe.WARMUP_STEPS,
        "adam_beta1": recipe.ADAM_BETAS[0],
        "adam_beta2": recipe.ADAM_BETAS[1],
        "weight_decay": recipe.WEIGHT_DECAY,
        "max_grad_norm": recipe.MAX_GRAD_NORM,
        "num_train_epochs": recipe.EPOCHS,
        "max_steps": recipe.MAX_STEPS,
        "save_steps": recipe.SAVE_EVERY,
        "save_total_limit": recipe.SAVE_LIMIT,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not finite has to be seen
        "ddp_find_unused_parameters": False,  # every parameter takes part in every step
        "report_to": recipe.REPORT_TO,  # TensorBoard's curves are the monitor's
        "disable_tqdm": True,  # so are the console's lines
    }


def lora_config(recipe: SimpleNamespace, model: "PreTrainedModel") -> "LoraConfig":
    """The LoRA constants under PEFT's names. Raises UserError for a module that `model` has not."""
    import torch
    from peft import LoraConfig

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    there = sorted({name.split(".")[-1] for name in linear})
    for name in recipe.LORA_MODULES:
        if name not in there:
            raise UserError(f"LORA_MODULES: this model has no {name!r} (it has: {', '.join(there)}); mend the list")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.LORA_RANK,
        lora_alpha=recipe.LORA_ALPHA,
        lora_dropout=recipe.LORA_DROPOUT,
        target_modules=recipe.LORA_MODULES,
    )


def accumulation_steps(recipe: SimpleNamespace, processes: int) -> int:
    """Forward passes per optimizer step and process, so that any number of GPUs trains on the same step.

    Raises:
        UserError: the completions of a step do not divide into the micro batches of all processes.
    """
    completions, at_once = recipe.QUESTIONS_PER_STEP * recipe.COMPLETIONS_PER_QUESTION, recipe.MICRO_BATCH * processes
    if completions % at_once:
        raise UserError(
            f"QUESTIONS_PER_STEP {recipe.QUESTIONS_PER_STEP} x COMPLETIONS_PER_QUESTION "
            f"{recipe.COMPLETIONS_PER_QUESTION} = {completions} completions a step cannot be split into MICRO_BATCH "
            f"{recipe.MICRO_BATCH} on {processes} process(es); change one so that {at_once} divides it"
        )
    return completions // at_once


# --------------------------------------------------------------------------------------------------- how a run goes
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """How this run goes; what the experiment is stands in the constants above."""
    return make_parser("GRPO on Chinese GSM8K", OUTPUT_DIR).parse_args(argv)


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """The flags that train_sft.py has too; `output` is where it writes by default."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model", help=f"hub id or folder (default: {MODEL})")
    parser.add_argument("--dataset", help=f"hub id or folder (default: {DATASET})")
    parser.add_argument("--output", help=f"where this run writes (default: {output}, the demo: {OUTPUT_DIR}/demo)")
    parser.add_argument("--max-steps", type=int, help="stop after so many optimizer steps")
    parser.add_argument("--seed", type=int, help=f"another seed (default: {SEED})")
    parser.add_argument("--resume", action="store_true", help="continue the newest complete checkpoint in the output")
    parser.add_argument("--demo", action="store_true", help="a tiny model on made problems: minutes, any machine")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU (very slow, except for the demo)")
    return parser


def default_recipe() -> dict:
    """The constants above and the rewards' weights, by name."""
    return constants_of(sys.modules[__name__]) | {"REWARD_WEIGHTS": REWARD_WEIGHTS}


def make_recipe(flags: argparse.Namespace) -> SimpleNamespace:
    """The constants of this file, the demo's own where it is the demo, and the flags on top."""
    given = {"MODEL": flags.model, "DATASET": flags.dataset, "OUTPUT_DIR": flags.output}
    given |= {"MAX_STEPS": flags.max_steps, "SEED": flags.seed}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = default_recipe()
    if flags.demo:
        recipe |= demo.RECIPE
        recipe["MODEL"], recipe["DATASET"] = demo.folders(Path((recipe | given)["OUTPUT_DIR"], "base"))
    return SimpleNamespace(**recipe | given)


def check_constants(recipe: SimpleNamespace) -> None:
    """Raises UserError for the first constant of a wrong type or out of its range, or for what is not installed."""
    check_types(recipe, sys.modules[__name__])
    weights = recipe.REWARD_WEIGHTS
    if not (is_a(weights, list[float]) and weights_fit(weights)):
        raise UserError(
            f"REWARD_WEIGHTS = {weights!r} is not {len(REWARDS)} numbers of 0 or more, the language's at most a tenth "
            "of all there is to earn; mend it in rewards.py"
        )
    betas = recipe.ADAM_BETAS
    ranges = {  # of those that need not simply be above 0
        "SEED": ("from 0 to 2**32 - 1", 0 <= recipe.SEED < 2**32),
        "COMPLETIONS_PER_QUESTION": ("2 or more: one is its own baseline", recipe.COMPLETIONS_PER_QUESTION >= 2),
        "WARMUP_STEPS": ("0 or more", recipe.WARMUP_STEPS >= 0),
        "ADAM_BETAS": ("two from 0, below 1", len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
        "WEIGHT_DECAY": ("0 or more", recipe.WEIGHT_DECAY >= 0),
        "MAX_GRAD_NORM": ("0 or more", recipe.MAX_GRAD_NORM >= 0),
        "MAX_STEPS": ("-1, or 1 or more", recipe.MAX_STEPS == -1 or recipe.MAX_STEPS >= 1),
        "BETA": ("0 or more", recipe.BETA >= 0),
        "LORA_DROPOUT": ("from 0, below 1", 0 <= recipe.LORA_DROPOUT < 1),
        "LORA_MODULES": ("one name or more", recipe.LORA_MODULES != []),
        "REWARD_MODEL": ("", True),  # "": there is none
    }
    check_ranges(vars(recipe), ranges, "train_grpo.py")
    if recipe.REWARD_MODEL:
        refuse_missing_folder(recipe.REWARD_MODEL, "REWARD_MODEL")
    if recipe.BETA > 0 and not recipe.USE_LORA and Path(recipe.MODEL, "adapter_config.json").exists():
        raise UserError(  # TRL would load what the adapter was trained on as the untrained model of the KL term
            f"BETA = {recipe.BETA!r} with the adapter {recipe.MODEL!r}: set it to 0.0, or name the merged model"
        )
    if recipe.USE_VLLM and importlib.util.find_spec("vllm") is None:
        raise UserError("USE_VLLM = True needs vLLM: pip install vllm==0.30.0, or set it to False")
    if recipe.REPORT_TO != "none":
        from transformers.integrations import get_available_reporting_integrations

        if recipe.REPORT_TO not in get_available_reporting_integrations() or recipe.REPORT_TO == "tensorboard":
            raise UserError(
                f"REPORT_TO = {recipe.REPORT_TO!r} is no tracker that is installed here: pip install it, or set it to "
                '"none" (TensorBoard is written in any case)'
            )


def check_folders(flags: argparse.Namespace, recipe: SimpleNamespace) -> None:
    """Raises UserError for a model's or a data set's folder that is not there."""
    for name, given in (("MODEL", flags.model), ("DATASET", flags.dataset)):
        made_here = flags.demo and (given is None or pretraining.is_ours(given))
        if not made_here:
            refuse_missing_folder(getattr(recipe, name), f"{name} (--{name.lower()})")


# What to say when a GPU's memory is full, the cheapest first
OUT_OF_MEMORY = (
    "out of GPU memory; lower MICRO_BATCH (the step stays the same), lower EVAL_BATCH, set GRADIENT_CHECKPOINTING = "
    "True, set BETA = 0.0, lower MAX_COMPLETION_TOKENS, lower QUESTIONS_PER_STEP, all of which --resume allows; or "
    "set USE_LORA = True in a new run"
)


def take_machine(flags: argparse.Namespace, bf16: bool) -> "tuple[PartialState, torch.dtype | None]":
    """The processes and their devices, and the dtype of autocast there. Raises UserError without a GPU."""
    import torch
    from accelerate import PartialState

    from engine.models import pick_device

    device, autocast = pick_device(flags.cpu, bf16)
    on_cpu = device.type == "cpu"
    if on_cpu and not (flags.demo or flags.cpu):
        raise UserError(
            "no CUDA GPU found (no driver, or a torch built without CUDA?); "
            "--demo trains a tiny model on any machine, --cpu trains this one, very slowly"
        )
    if on_cpu and flags.demo:
        torch.set_num_threads(min(torch.get_num_threads(), 2))  # a tiny model has work for two; more only wait
    # `accelerate config` has an answer of its own, which accelerate would follow where bf16 is off
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if autocast else "no"
    return PartialState(cpu=on_cpu, timeout=timedelta(minutes=30)), autocast  # others wait while one evaluates


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    recipe = make_recipe(flags)
    output = Path(recipe.OUTPUT_DIR)

    # ---- what can be refused is refused before anything is loaded, written or deleted
    check_constants(recipe)
    check_folders(flags, recipe)

    from transformers import PrinterCallback

    from engine import checkpoints
    from engine.curves import read_history
    from engine.models import drop_long, load_model
    from engine.monitor import Monitor
    from engine.preference import load_preference
    from engine.rollout import Rollout
    from engine.trainer import CarefulTrainer

    state, autocast = take_machine(flags, recipe.BF16)
    accumulation = accumulation_steps(recipe, state.num_processes)
    with state.main_process_first():
        if state.is_main_process and (output.exists() or flags.demo and not flags.resume):  # else `begin` makes it
            lock(output)
        checkpoint = checkpoints.find(output, recipe, flags.resume)
        if flags.demo:
            pretraining.provide(output / "base", flags.model, flags.dataset)

    # ---- data, model, trainer
    train = load_questions(recipe.DATASET, "train", unlabelled=recipe.REWARD_MODEL != "")
    test = load_questions(recipe.DATASET, "test")
    model, tokenizer = load_model(recipe.MODEL)
    fitting = drop_long(train, tokenizer, recipe.MAX_PROMPT_TOKENS, recipe.QUESTIONS_PER_STEP)
    rollout = Rollout(recipe.FAST_ROLLOUT)
    preference = [load_preference(recipe, state.device, autocast)] if recipe.REWARD_MODEL else []
    trainer = CarefulTrainer(
        model=model,
        reward_funcs=REWARDS + preference,
        args=grpo_config(recipe, state.device.type == "cpu", autocast is not None, accumulation),
        train_dataset=fitting,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model) if recipe.USE_LORA else None,
        rollout_func=None if recipe.USE_VLLM else rollout,
    )
    trainer.remove_callback(PrinterCallback)  # it would print thirty keys a step
    checkpoints.check_disk(output, trainer.model, recipe.SAVE_LIMIT)

    # ---- before, train, save, after
    results = checkpoints.begin(output, recipe, checkpoint) if state.is_main_process else {}
    begun = checkpoints.step_of(checkpoint) if checkpoint else 0
    history = read_history(output, until=begun) if checkpoint else []
    monitor = Monitor(recipe, trainer, rollout, test, begun, history)
    if state.is_main_process:
        monitor.print_header(dropped=len(train) - len(fitting))
    carry_out(monitor, results, checkpoint, OUT_OF_MEMORY)


def carry_out(monitor: "Watch", results: dict, checkpoint: Path | None, out_of_memory: str) -> None:
    """Accuracy before, the training, accuracy after; however it ends, the curves are drawn.

    Args:
        monitor: watches the run, and knows its trainer and its folder.
        results: what an earlier start of this run has found out.
        checkpoint: what the run continues; None for a new one.
        out_of_memory: what to say when a GPU's memory is full.
    """
    import torch

    from engine import checkpoints
    from engine.curves import draw_curves
    from engine.model_card import model_card

    recipe, trainer, output = monitor.recipe, monitor.trainer, monitor.output
    main_process = trainer.is_world_process_zero()
    trainer.add_callback(monitor)
    try:
        if main_process:
            if "before" not in results:
                before, text = monitor.examine("before", step=0)
                results = {"model": recipe.MODEL, "dataset": recipe.DATASET, "seed": recipe.SEED, "before": before}
                results["probe"] = {"question": recipe.PROBE_QUESTION, "before": text}
            checkpoints.write_json(output / "results.json", results | {"finished": False})

        # ---- train
        with checkpoints.StopSignals(trainer) as stop:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if stop.signal:
            stop.leave(output, results | monitor.results())

        # ---- save, after
        checkpoints.save_trained(trainer, output, recipe.MAX_COMPLETION_TOKENS)
        if main_process:
            results["after"], results["probe"]["after"] = monitor.examine("after", trainer.state.global_step)
            results |= monitor.results() | {"finished": True}
            checkpoints.write_json(output / "results.json", results)
            checkpoints.write_text(output / "README.md", model_card(checkpoints.describe_recipe(recipe), results))
            monitor.print_summary(results)
    except torch.OutOfMemoryError as error:
        if not trainer.is_local_process_zero():  # maybe alone in this, and `run` lets only the first process speak
            print(f"error: {out_of_memory}", file=sys.stderr, flush=True)
        raise UserError(out_of_memory) from error
    finally:
        if main_process and monitor.history:
            checkpoints.attempt(draw_curves, {output.name: monitor.history}, output / "curves.png")
    checkpoints.end_together(trainer)


if __name__ == "__main__":
    run(main)
