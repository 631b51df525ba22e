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
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import train_grpo
from engine import demo, runs
from engine.console import UserError, first_line, note, run
from engine.constants import check_constants, constants_of
from engine.fingerprints import fingerprint_rows
from engine.numbers import is_label

if TYPE_CHECKING:  # imported where they are used: `--help` and the one-line errors need no seconds to start
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

# ----------------------------------------------------------------------------------------------------- the recipe
OUTPUT_DIR: str = "output/sft"  # --output

# The rows: traces, and conversations where --mix names some
MIX_SHARE: float = 0.2  # of the rows are conversations, from 0, below 1; a quarter as many as there are traces
MAX_TOKENS: int = 1024  # of a row, its prompt included; longer ones are dropped, and so are completions longer than
# MAX_COMPLETION_TOKENS, which the model could never finish

# One optimizer step
ROWS_PER_STEP: int = 16  # a few hundred traces still make some dozens of steps
MICRO_BATCH: int = 8  # rows per forward and GPU; halve it if out of memory, the step stays the same
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
    "DEV_QUESTIONS PROBE_QUESTION FAST_ROLLOUT REPORT_TO"
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
    recipe = runs.make_recipe(defaults, constants, flags, demo.RECIPE | demo.SFT_RECIPE)
    recipe.TRACES, recipe.MIX = flags.traces or str(Path(recipe.OUTPUT_DIR, "traces.jsonl")), flags.mix
    check_constants(vars(recipe), train_grpo, sys.modules[__name__])
    runs.check_folders(recipe, flags.demo)
    return flags, recipe


# ------------------------------------------------------------------------------------------------- files -> rows
def read_rows(file: str, flag: str, convert: Callable[[dict], dict]) -> list[dict]:
    """The lines of a file as `{"prompt": [messages], "completion": [one assistant's message]}`.

    Raises:
        UserError: no such file, not UTF-8, nothing in it, or a line of another format. A line with half a surrogate
            pair, which no tokenizer takes, is only dropped, aloud.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file!r} is not UTF-8: {first_line(error)}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file!r} cannot be read: {first_line(error)}; name another file") from error
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(convert(json.loads(line)))
            except UnicodeEncodeError:
                broken.append(number)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{flag} {file!r}, line {number}: {first_line(error)}; mend or drop it") from error
    if broken:
        note(f"{flag}: {len(broken)} lines dropped that hold half a surrogate pair, the first is line {broken[0]}")
    if not rows:
        raise UserError(f"{flag} {file!r} is empty; name another file")
    return rows


def from_trace(line: dict) -> dict:
    """A line of make_traces.py, or one like it; its prompt is used as it stands."""
    prompt, completion = messages_of(line, "prompt"), messages_of(line, "completion")
    if prompt[-1]["role"] != "user" or [message["role"] for message in completion] != ["assistant"]:
        raise ValueError("not a prompt that ends with the user and a completion of one assistant's message")
    if line.get("answer") is not None and not is_label(line["answer"]):
        raise ValueError(f"answer is {line['answer']!r}, not an integer")
    return {"prompt": prompt, "completion": completion}


def from_conversation(line: dict) -> dict:
    """A conversation: its last assistant's message is learned, what stands before is the prompt."""
    messages = messages_of(line, "messages")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise ValueError("no assistant's message that answers a user's")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def messages_of(line: dict, name: str) -> list[dict]:
    """The messages under `name`, their role and content and nothing else. Raises ValueError."""
    messages = line.get(name) if isinstance(line, dict) else None
    roles = ("system", "user", "assistant")
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"no list of messages under {name!r}")
    for message in messages:
        if not (isinstance(message, dict) and message.get("role") in roles and isinstance(message.get("content"), str)):
            raise ValueError(f"a message under {name!r} without a text as content or a role of {', '.join(roles)}")
        message["content"].encode()  # UnicodeEncodeError, which is a ValueError: half a surrogate pair is no text
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def keep_usable(
    rows: list[dict], flag: str, tokenizer: "PreTrainedTokenizerBase", held_out: set[str], recipe: SimpleNamespace
) -> list[dict]:
    """The rows that are short enough and give away no held-out question; a note says how many fall, and why.

    Raises:
        UserError: none is left.
    """
    from engine.templates import count_tokens

    limits = f"longer than MAX_TOKENS {recipe.MAX_TOKENS} or MAX_COMPLETION_TOKENS {recipe.MAX_COMPLETION_TOKENS}"
    fallen, kept = {limits: 0, "on test or development questions": 0}, []
    for row, (prompt, completion) in zip(rows, count_tokens(tokenizer, rows), strict=True):
        if prompt + completion > recipe.MAX_TOKENS or completion > recipe.MAX_COMPLETION_TOKENS:
            fallen[limits] += 1
        elif row["prompt"][-1]["content"] in held_out:
            fallen["on test or development questions"] += 1
        else:
            kept.append(row)
    said = ", ".join(f"{count} {why}" for why, count in fallen.items() if count)
    if not kept:
        raise UserError(f"{flag}: none of {len(rows)} rows can be learned: {said}; raise the limit, or name other rows")
    if said:
        note(f"{flag}: {len(rows) - len(kept)} of {len(rows)} rows dropped: {said}")
    return kept


def draw_mix(conversations: list[dict], traces: int, share: float, seed: int) -> list[dict]:
    """As many conversations, drawn by chance, as make this share of all rows."""
    wanted = round(traces * share / (1 - share))
    if wanted > len(conversations):
        note(f"--mix: MIX_SHARE {share} asks for {wanted} conversations, there are {len(conversations)}: all are taken")
    return random.Random(seed).sample(conversations, min(wanted, len(conversations)))


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
    from engine.models import check_positions, load_model
    from engine.monitor import SftMonitor
    from engine.questions import load_splits
    from engine.rollout import Rollout
    from engine.trainer import CarefulSFTTrainer

    state, autocast = runs.start_processes(flags, recipe.BF16)
    accumulation = runs.accumulation_steps(recipe, ("ROWS_PER_STEP",), state.num_processes)
    checkpoint = runs.open_output(flags, recipe, state)

    # ---- data, model, trainer
    _, dev, test = load_splits(recipe.DATASET, recipe.DEV_QUESTIONS)
    runs.record_inputs(recipe, checkpoint, DEV=dev, TEST=test)
    model, tokenizer = load_model(recipe.MODEL, prompt=runs.prompt_turns(recipe))
    checkpoints.limit_answers(model, recipe.MAX_COMPLETION_TOKENS)
    check_positions(model, f"MODEL {recipe.MODEL!r}", MAX_TOKENS=recipe.MAX_TOKENS)
    held_out = {prompt[-1]["content"] for rows in (dev, test) for prompt in rows["prompt"]}
    traces = keep_usable(traces, "--traces", tokenizer, held_out, recipe)
    if mix:
        mix = keep_usable(mix, "--mix", tokenizer, held_out, recipe)
        mix = draw_mix(mix, len(traces), recipe.MIX_SHARE, recipe.SEED)
    trainer = CarefulSFTTrainer(
        model=model,
        args=sft_config(recipe, state.device.type == "cpu", autocast is not None, accumulation),
        train_dataset=Dataset.from_list(traces + mix),
        processing_class=tokenizer,
        peft_config=runs.lora_config(recipe, model),
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
