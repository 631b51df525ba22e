"""What the two training scripts share: flags, folders, devices, the model, and the run from `before` to `after`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from engine import constants, demo, pretraining
from engine.console import UserError, refuse_missing_folder
from engine.fingerprints import fingerprint_rows, fingerprint_weights
from engine.folder import lock
from engine.questions import pairs_of
from engine.templates import carried_prompt, prompt_turns

if TYPE_CHECKING:  # imported where they are used, so that `--help` and the one-line errors come at once
    import torch
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from engine.monitor import RunMonitor

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before any of these libraries is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks helps nobody here
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)  # about options that these libraries rename


# ------------------------------------------------------------------------------------------------ flags -> constants
def make_parser(description: str, defaults: dict[str, Any]) -> argparse.ArgumentParser:
    """The flags of a training run. The help shows `defaults`, the constants that they change."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model", help=f"hub id or folder (default: {defaults['MODEL']})")
    parser.add_argument("--dataset", help=f"hub id, folder or file (default: {defaults['DATASET']})")
    parser.add_argument(
        "--output",
        help=f"where this run writes (default: {defaults['OUTPUT_DIR']}, the demo: {demo.RECIPE['OUTPUT_DIR']})",
    )
    parser.add_argument("--max-steps", type=int, help="stop after so many optimizer steps")
    parser.add_argument("--seed", type=int, help=f"another seed (default: {defaults['SEED']})")
    parser.add_argument("--resume", action="store_true", help="continue the newest complete checkpoint in the output")
    parser.add_argument("--demo", action="store_true", help="a tiny model on made problems: minutes, any machine")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU (very slow, except for the demo)")
    return parser


def make_recipe(
    defaults: dict[str, Any], given: dict[str, Any], flags: argparse.Namespace, demo_changes: dict[str, Any]
) -> SimpleNamespace:
    """The constants of this run: the script's, changed by the demo, by those given to `main`, and by the flags."""
    by_flag = {"MODEL": flags.model, "DATASET": flags.dataset, "OUTPUT_DIR": flags.output, "SEED": flags.seed}
    by_flag["MAX_STEPS"] = getattr(flags, "max_steps", None)  # make_traces.py takes no steps
    changes = {}
    if flags.demo:
        output = flags.output or given.get("OUTPUT_DIR") or demo_changes["OUTPUT_DIR"]
        model, dataset = demo.folders(Path(output, "base"))
        changes = {"MODEL": model, "DATASET": dataset} | demo_changes
        changes = {name: value for name, value in changes.items() if name in defaults}
    return constants.make_recipe(defaults, changes, given, by_flag)


def check_folders(recipe: SimpleNamespace, is_demo: bool) -> None:
    """Raises UserError for a folder of a model or a data set that is not there, unless the demo will make it."""
    made = demo.folders(Path(recipe.OUTPUT_DIR, "base")) if is_demo else ()
    for name in ("MODEL", "DATASET"):
        value = getattr(recipe, name)
        if value not in made and not (is_demo and pretraining.is_demo_base(value)):
            refuse_missing_folder(value, f"{name} (--{name.lower()})")


# -------------------------------------------------------------------------------- constants -> TRL's arguments, devices
def common_arguments(recipe: SimpleNamespace, on_cpu: bool, bf16: bool, accumulation: int) -> dict[str, Any]:
    """The constants that every trainer of TRL takes, under the names of its configuration."""
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
        "logging_nan_inf_filter": False,  # show a loss that is not finite
        "ddp_find_unused_parameters": False,  # every parameter takes part in every step
        "report_to": recipe.REPORT_TO,  # the monitor writes TensorBoard's curves
        "disable_tqdm": True,  # the monitor prints a line for each step
    }


def accumulation_steps(recipe: SimpleNamespace, step: tuple[str, ...], processes: int) -> int:
    """Forward passes per optimizer step and process, so that a step has the same rows on any number of GPUs.

    The product of the constants in `step` is the number of rows. Raises UserError if it does not divide evenly.
    """
    rows = math.prod(getattr(recipe, name) for name in step)
    at_once = recipe.MICRO_BATCH * processes
    if rows % at_once:
        product = " x ".join(f"{name} {getattr(recipe, name)}" for name in step)
        raise UserError(
            f"{product} = {rows} rows a step cannot be split into MICRO_BATCH {recipe.MICRO_BATCH} on {processes} "
            f"process(es); change one so that {at_once} divides it"
        )
    return rows // at_once


def start_processes(flags: argparse.Namespace, bf16: bool) -> tuple[PartialState, torch.dtype | None]:
    """The processes of this run on their devices, and the dtype of autocast there (None: float32).

    Raises UserError if there is no GPU and neither --demo nor --cpu was given.
    """
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
        torch.set_num_threads(min(torch.get_num_threads(), 2))  # so tiny a model is no faster on more
    # without this accelerate would follow what `accelerate config` has stored
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if autocast else "no"
    # the other processes wait so long for the main one to evaluate
    return PartialState(cpu=on_cpu, timeout=timedelta(minutes=30)), autocast


# ------------------------------------------------------------------------------------------------------ the run
def open_output(flags: argparse.Namespace, recipe: SimpleNamespace, state: PartialState) -> Path | None:
    """Lock the output folder, make what the demo needs, and return the checkpoint to continue (None: a new run).

    Raises UserError as `folder.lock` and `checkpoints.find` do.
    """
    from accelerate.utils import gather_object

    from engine import checkpoints

    output, checkpoint, errors = Path(recipe.OUTPUT_DIR), None, []
    with state.main_process_first():
        try:
            if state.is_main_process and (output.exists() or flags.demo and not flags.resume):  # else `begin` makes it
                lock(output)
            checkpoint = checkpoints.find(output, recipe, flags.resume)
            if flags.demo:
                pretraining.prepare_demo(output / "base", recipe.MODEL, recipe.DATASET)
        except UserError as error:
            errors.append(error)
    if errors := gather_object(errors):  # all processes end, or the others would wait for one that has ended
        raise errors[0]
    return checkpoint


def record_inputs(recipe: SimpleNamespace, checkpoint: Path | None, **questions: Dataset) -> None:
    """Write fingerprints of the model and the questions into the recipe, as `MODEL_READ`, `TRAIN_READ` and so on.

    Raises UserError if the run continues `checkpoint` and cannot do so with other contents.
    """
    from engine import checkpoints

    for name, rows in questions.items():
        setattr(recipe, f"{name}_READ", fingerprint_rows(pairs_of(rows)))
    recipe.MODEL_READ = fingerprint_weights(recipe.MODEL)
    if getattr(recipe, "REWARD_MODEL", ""):
        recipe.REWARD_MODEL_READ = fingerprint_weights(recipe.REWARD_MODEL)
    if checkpoint:
        checkpoints.refuse_incompatible(checkpoint.parent, recipe)


def load_policy(recipe: SimpleNamespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer, as in `models.load_model`. The recipe gets the prompt that it carries."""
    from engine.checkpoints import limit_answers
    from engine.models import load_model

    model, tokenizer = load_model(recipe.MODEL, prompt=prompt_turns(recipe.SYSTEM_PROMPT, recipe.EXAMPLE))
    limit_answers(model, recipe.MAX_COMPLETION_TOKENS)
    turns = carried_prompt(tokenizer.chat_template)
    recipe.SYSTEM_PROMPT, recipe.EXAMPLE = turns[0]["content"], turns[1:]
    return model, tokenizer


OUT_OF_MEMORY = (
    "out of GPU memory; lower MICRO_BATCH (the step stays the same), EVAL_BATCH or MAX_COMPLETION_TOKENS, or set "
    "GRADIENT_CHECKPOINTING = True, all of which --resume allows; or set USE_LORA = True in a new run"
)


def train_and_measure(monitor: RunMonitor, results: dict, checkpoint: Path | None) -> None:
    """Measure the model, train it, save it, and measure it again. The curves are drawn in any case.

    Args:
        results: what an earlier start of this run has measured; {} for a new run.
        checkpoint: what the run continues; None for a new run.
    """
    import torch

    from engine import checkpoints, lora
    from engine.curves import draw_curves
    from engine.model_card import model_card

    recipe, trainer, output = monitor.recipe, monitor.trainer, monitor.output
    main_process = trainer.is_world_process_zero()
    trainer.add_callback(monitor)
    try:
        # ---- before
        if main_process:
            if "before" not in results:
                before, text = monitor.measure_model("before", step=0)
                results = {"model": recipe.MODEL, "dataset": recipe.DATASET, "seed": recipe.SEED, "before": before}
                results["probe"] = {"question": recipe.PROBE_QUESTION, "before": text}
            checkpoints.write_json(output / "results.json", results | {"finished": False})

        # ---- train
        with checkpoints.StopSignals(trainer) as stop:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if stop.signal:
            stop.leave(output, results | monitor.results())

        # ---- save, after
        lora.restore_frozen(trainer.model, recipe.MODEL, recipe.MODEL_READ)
        checkpoints.save_trained(trainer, output, recipe.MAX_COMPLETION_TOKENS)
        if main_process:
            results["after"], results["probe"]["after"] = monitor.measure_model("after", trainer.state.global_step)
            results |= monitor.results() | {"finished": True}
            checkpoints.write_json(output / "results.json", results)
            checkpoints.write_text(output / "README.md", model_card(checkpoints.describe_recipe(recipe), results))
            monitor.print_summary(results)
    except torch.OutOfMemoryError as error:
        if not trainer.is_local_process_zero():  # of these `console.run` prints no errors
            print(f"error: {OUT_OF_MEMORY}", file=sys.stderr, flush=True)
        raise UserError(OUT_OF_MEMORY) from error
    finally:
        if main_process and monitor.history:
            checkpoints.failure_of(draw_curves, {output.name: monitor.history}, output / "curves.png")
    checkpoints.end_together(trainer)
