"""Teach a model written traces: the supervised fine-tuning before and after GRPO, by TRL's SFTTrainer on one GPU.

Three steps of DeepSeek-R1 (arXiv 2501.12948) are this one script on different traces, which make_traces.py makes:
  1. the cold start before GRPO: the model's own right answers, rewritten into the format;
  2. the second fine-tuning after it, from the untrained model again: what the trained model answers right, and
     conversations of other kinds mixed in, so that nothing else is forgotten;
  3. distillation: the right answers of a larger model.
Only the completion is learned, with its end. A trace is learned whole or dropped, aloud, never cut.

    python train_sft.py --traces output/traces/traces.jsonl
    python train_sft.py --traces output/traces/traces.jsonl --mix chat.jsonl    # {"messages": [...]} lines
    python train_sft.py --demo                                                  # after make_traces.py --demo
    python train_grpo.py --model output/sft                                     # GRPO from there
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import train_grpo
from engine import demo, runs
from engine.console import UserError, run
from engine.constants import check_constants, constants_of
from engine.fingerprints import fingerprint_rows
from engine.traces import draw_mix, from_conversation, from_trace, keep_usable, read_rows

if TYPE_CHECKING:  # imported where they are used: `--help` and the one-line errors need no seconds to start
    from trl import SFTConfig

# ----------------------------------------------------------------------------------------------------- the recipe
OUTPUT_DIR: str = "output/sft"  # --output

# The rows: traces, and conversations where --mix names some
MIX_SHARE: float = 0.2  # of the rows are conversations, from 0, below 1; a quarter as many as there are traces
MAX_TOKENS: int = 1024  # of a row, its prompt included; longer ones are dropped, and so are completions longer than
# MAX_COMPLETION_TOKENS, which the model could never finish

# One optimizer step
ROWS_PER_STEP: int = 16  # a few hundred traces still make some dozens of steps
MICRO_BATCH: int = 0  # rows per forward and GPU, 0: as many as fit; the step stays the same
LEARNING_RATE: float = 1e-5  # peak; gentle, for an instruct model on traces of its own. More makes it forget
FINAL_RATE: float = 0.1  # of the peak, 0 to 1, where the cosine ends
WARMUP_STEPS: float = 0  # over which the rate rises from 0, below 1 a share of all; so small a rate needs none
EPOCHS: float = 2.0  # passes over the rows; 2 or 3, more only learns the traces by heart
MAX_STEPS: int = -1  # optimizer steps, -1: all of EPOCHS; --max-steps

# LoRA
USE_LORA: bool = False  # True trains an adapter only, of the shape that train_grpo.py says
LORA_LEARNING_RATE: float = 1e-4  # an adapter wants about ten times the rate of the whole model

# What train_grpo.py says holds here too, the demo's values where it is the demo
SHARED = (
    "MODEL DATASET SEED MAX_COMPLETION_TOKENS BF16 GRADIENT_CHECKPOINTING ADAM_BETAS WEIGHT_DECAY MAX_GRAD_NORM "
    "SYSTEM_PROMPT EXAMPLE LORA_RANK LORA_ALPHA LORA_DROPOUT LORA_MODULES SAVE_EVERY SAVE_LIMIT EVAL_EVERY EVAL_BATCH "
    "DEV_QUESTIONS TEST_QUESTIONS PROBE_QUESTION FAST_ROLLOUT REPORT_TO"
).split()


# ------------------------------------------------------------------------------------------- what becomes of them
def sft_config(recipe: SimpleNamespace, on_cpu: bool, bf16: bool, accumulation: int) -> "SFTConfig":
    """The constants under TRL's names, and the few settings that are no choice."""
    from trl import SFTConfig

    config = SFTConfig(
        **runs.common_arguments(recipe, on_cpu, bf16, accumulation),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.FINAL_RATE},
        completion_only_loss=True,  # said, for None would be decided by the first row
        max_length=None,  # a number would cut rows silently, their end tokens with them
    )
    config._n_gpu = min(config.n_gpu, 1)  # without a launcher: one GPU, not DataParallel, which TRL refuses
    return config


# --------------------------------------------------------------------------------------------------- how a run goes
def default_recipe() -> dict[str, Any]:
    """The constants of this file and the shared ones, by name."""
    shared = train_grpo.default_recipe()
    return {name: shared[name] for name in SHARED} | constants_of(sys.modules[__name__])


def configure(argv: list[str] | None, constants: dict[str, Any]) -> tuple[argparse.Namespace, SimpleNamespace]:
    """The flags and the checked constants of this run. Raises UserError for what cannot be."""
    defaults = default_recipe()
    parser = runs.make_parser("supervised fine-tuning on traces", defaults)
    parser.add_argument("--traces", help="what make_traces.py wrote (the demo's default: traces.jsonl in its output)")
    parser.add_argument("--mix", help='a file of {"messages": [...]} lines, conversations of other kinds')
    flags = parser.parse_args(argv)
    if not (flags.traces or flags.demo):
        raise UserError("--traces FILE is missing: name the traces.jsonl that make_traces.py wrote")
    of_demo = {name: value for name, value in demo.RECIPE.items() if name in SHARED} | demo.SFT_RECIPE
    recipe = runs.make_recipe(defaults, constants, flags, of_demo)
    recipe.TRACES, recipe.MIX = flags.traces or str(Path(recipe.OUTPUT_DIR, "traces.jsonl")), flags.mix
    check_constants(vars(recipe), train_grpo, sys.modules[__name__])
    runs.check_folders(recipe, flags.demo)
    return flags, recipe


def main(argv: list[str] | None = None, **constants: Any) -> None:
    """Train. `constants` replace those above, and the shared ones, by name, for this run."""
    flags, recipe = configure(argv, constants)  # refuses what it can before anything is loaded, written or deleted
    output = Path(recipe.OUTPUT_DIR)
    traces = read_rows(recipe.TRACES, "--traces", from_trace)
    mix = read_rows(recipe.MIX, "--mix", from_conversation) if recipe.MIX else []
    # by these --resume says what has changed and kept its name
    recipe.TRACES_READ, recipe.MIX_READ = fingerprint_rows(traces), fingerprint_rows(mix)

    from datasets import Dataset
    from transformers import PrinterCallback

    from engine import checkpoints
    from engine.curves import read_history
    from engine.lora import lora_config
    from engine.memory import fit_batches
    from engine.models import check_positions
    from engine.monitor import SftMonitor
    from engine.questions import first_of, load_splits
    from engine.rollout import Rollout
    from engine.trainer import LeanSFTTrainer

    state, autocast = runs.start_processes(flags, recipe.BF16)
    rows = recipe.ROWS_PER_STEP // state.num_processes
    fit_batches(recipe, state.device, autocast is not None, recipe.MAX_TOKENS, rows, flags.resume)
    accumulation = runs.accumulation_steps(recipe, ("ROWS_PER_STEP",), state.num_processes)
    checkpoint = runs.open_output(flags, recipe, state)

    # ---- data, model, trainer
    _, dev, test = load_splits(recipe.DATASET, recipe.DEV_QUESTIONS)
    held_out = {prompt[-1]["content"] for rows in (dev, test) for prompt in rows["prompt"]}
    test = first_of(test, recipe.TEST_QUESTIONS)
    runs.record_inputs(recipe, checkpoint, DEV=dev, TEST=test)
    model, tokenizer = runs.load_policy(recipe)
    check_positions(model, f"MODEL {recipe.MODEL!r}", MAX_TOKENS=recipe.MAX_TOKENS)
    traces = keep_usable(traces, "--traces", tokenizer, held_out, recipe)
    if mix:
        mix = keep_usable(mix, "--mix", tokenizer, held_out, recipe)
        mix = draw_mix(mix, len(traces), recipe.MIX_SHARE, recipe.SEED)
    trainer = LeanSFTTrainer(
        model=model,
        args=sft_config(recipe, state.device.type == "cpu", autocast is not None, accumulation),
        train_dataset=Dataset.from_list(traces + mix),
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model),
    )
    trainer.remove_callback(PrinterCallback)  # it would print ten keys a step
    checkpoints.check_disk(output, trainer.model, recipe.SAVE_LIMIT)

    # ---- before, train, save, after
    results = checkpoints.begin(output, recipe, checkpoint) if state.is_main_process else {}
    begun = checkpoints.step_of(checkpoint) if checkpoint else 0
    history = read_history(output, until=begun) if checkpoint else []
    monitor = SftMonitor(recipe, trainer, Rollout(recipe.FAST_ROLLOUT), dev, test, begun, history)
    if state.is_main_process:
        monitor.print_header(f"{len(traces)} traces of {recipe.TRACES}, {len(mix)} conversations mixed in")
    runs.train_and_measure(monitor, results, checkpoint)


if __name__ == "__main__":
    run(main)
