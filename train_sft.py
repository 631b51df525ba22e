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
import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import train_grpo
from engine import demo, pretraining
from engine.console import UserError, check_ranges, check_types, constants_of, first_line, note, run
from engine.folder import lock
from engine.numbers import is_label
from engine.questions import load_questions

if TYPE_CHECKING:  # imported where they are used: `--help` and the one-line errors need no seconds to start
    from datasets import Dataset
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
    "LORA_RANK LORA_ALPHA LORA_DROPOUT LORA_MODULES SAVE_EVERY SAVE_LIMIT EVAL_EVERY EVAL_QUESTIONS EVAL_BATCH "
    "PROBE_QUESTION FAST_ROLLOUT REPORT_TO"
).split()


# ------------------------------------------------------------------------------------------- what becomes of them
def sft_config(recipe: SimpleNamespace, on_cpu: bool, bf16: bool, accumulation: int) -> "SFTConfig":
    """The constants under TRL's names, and the few settings that are no choice."""
    from trl import SFTConfig

    config = SFTConfig(
        **train_grpo.common_arguments(recipe, on_cpu, bf16, accumulation),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.FINAL_RATE},
        completion_only_loss=True,  # said, for None would be decided by the first row
        max_length=None,  # a number would cut rows silently, their end tokens with them
    )
    config._n_gpu = min(config.n_gpu, 1)  # without a launcher: one GPU, not DataParallel, which TRL refuses
    return config


def accumulation_steps(recipe: SimpleNamespace, processes: int) -> int:
    """Forward passes per optimizer step and process. Raises UserError where they do not come out even."""
    if recipe.ROWS_PER_STEP % (recipe.MICRO_BATCH * processes):
        raise UserError(
            f"ROWS_PER_STEP {recipe.ROWS_PER_STEP} cannot be split into MICRO_BATCH {recipe.MICRO_BATCH} on "
            f"{processes} process(es); change one in train_sft.py so that {recipe.MICRO_BATCH * processes} divides it"
        )
    return recipe.ROWS_PER_STEP // (recipe.MICRO_BATCH * processes)


# --------------------------------------------------------------------------------------------------- how a run goes
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """How this run goes; what the experiment is stands in the constants above."""
    parser = train_grpo.make_parser("supervised fine-tuning on traces", OUTPUT_DIR)
    parser.add_argument("--traces", help="what make_traces.py wrote (the demo's default: traces.jsonl in its output)")
    parser.add_argument("--mix", help='a file of {"messages": [...]} lines, conversations of other kinds')
    flags = parser.parse_args(argv)
    if not (flags.traces or flags.demo):
        raise UserError("--traces FILE is missing: name the traces.jsonl that make_traces.py wrote")
    return flags


def make_recipe(flags: argparse.Namespace) -> SimpleNamespace:
    """The shared constants, those of this file, the demo's own where it is the demo, and the flags on top."""
    shared = vars(train_grpo.make_recipe(flags))
    recipe = {name: shared[name] for name in SHARED} | constants_of(sys.modules[__name__])
    if flags.demo:
        recipe |= demo.SFT_RECIPE
    given = {"OUTPUT_DIR": flags.output, "MAX_STEPS": flags.max_steps, "TRACES": flags.traces}
    recipe |= {name: value for name, value in given.items() if value is not None}
    recipe.setdefault("TRACES", str(Path(recipe["OUTPUT_DIR"], "traces.jsonl")))
    return SimpleNamespace(**recipe, MIX=flags.mix)


def check_constants(flags: argparse.Namespace, recipe: SimpleNamespace) -> None:
    """Raises UserError for the first constant, of this file or a shared one, of a wrong type or out of its range."""
    check_types(recipe, sys.modules[__name__])
    ranges = {  # of those that need not simply be above 0
        "MIX_SHARE": ("from 0, below 1", 0 <= recipe.MIX_SHARE < 1),
        "FINAL_RATE": ("from 0 to 1", 0 <= recipe.FINAL_RATE <= 1),
        "WARMUP_STEPS": ("0 or more", recipe.WARMUP_STEPS >= 0),
        "MAX_STEPS": ("-1, or 1 or more", recipe.MAX_STEPS == -1 or recipe.MAX_STEPS >= 1),
    }
    own = {name: getattr(recipe, name) for name in constants_of(sys.modules[__name__])}
    check_ranges(own, ranges, "train_sft.py")
    train_grpo.check_constants(train_grpo.make_recipe(flags))


# ------------------------------------------------------------------------------------------------- files -> rows
def read_rows(file: str, flag: str, convert: Callable[[dict], dict]) -> list[dict]:
    """The lines of a file as `{"prompt": [messages], "completion": [one assistant's message]}`.

    Raises:
        UserError: no such file, nothing in it, or a line of another format.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file!r} cannot be read: {first_line(error)}; name another file") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(convert(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{flag} {file!r}, line {number}: {first_line(error)}; mend or drop it") from error
    if not rows:
        raise UserError(f"{flag} {file!r} is empty; name another file")
    return rows


def fingerprint(rows: list[dict]) -> str:
    """What stands in the recipe for the rows that are learned: a file may change and keep its name."""
    return f"{len(rows)} rows, sha256 {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"


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
    """The messages under `name`, their role and content and nothing else."""
    messages = line.get(name) if isinstance(line, dict) else None
    roles = ("system", "user", "assistant")
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"no list of messages under {name!r}")
    for message in messages:
        if not (isinstance(message, dict) and message.get("role") in roles and isinstance(message.get("content"), str)):
            raise ValueError(f"a message under {name!r} without a text as content or a role of {', '.join(roles)}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def keep_usable(
    rows: list[dict], flag: str, tokenizer: "PreTrainedTokenizerBase", test: "Dataset", recipe: SimpleNamespace
) -> list[dict]:
    """The rows that are short enough and give away no test question; how many fall, and why, is said.

    Raises:
        UserError: none is left.
    """
    from engine.models import count_tokens

    asked = {prompt[-1]["content"] for prompt in test["prompt"]}
    limits = f"longer than MAX_TOKENS {recipe.MAX_TOKENS} or MAX_COMPLETION_TOKENS {recipe.MAX_COMPLETION_TOKENS}"
    fallen, kept = {limits: 0, "on questions of the test split": 0}, []
    for row, (prompt, completion) in zip(rows, count_tokens(tokenizer, rows), strict=True):
        if prompt + completion > recipe.MAX_TOKENS or completion > recipe.MAX_COMPLETION_TOKENS:
            fallen[limits] += 1
        elif row["prompt"][-1]["content"] in asked:
            fallen["on questions of the test split"] += 1
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


# What to say when a GPU's memory is full, the cheapest first
OUT_OF_MEMORY = (
    "out of GPU memory; lower MICRO_BATCH (the step stays the same), lower EVAL_BATCH or set GRADIENT_CHECKPOINTING = "
    "True in train_grpo.py, lower MAX_TOKENS, all of which --resume allows; or set USE_LORA = True in train_sft.py and "
    "begin a new run"
)


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    recipe = make_recipe(flags)
    output = Path(recipe.OUTPUT_DIR)

    # ---- what can be refused is refused before anything is loaded, written or deleted
    check_constants(flags, recipe)
    train_grpo.check_folders(flags, recipe)
    traces = read_rows(recipe.TRACES, "--traces", from_trace)
    mix = read_rows(recipe.MIX, "--mix", from_conversation) if recipe.MIX else []
    recipe.TRACES_READ, recipe.MIX_READ = fingerprint(traces), fingerprint(mix)  # --resume says where they differ

    from datasets import Dataset
    from transformers import PrinterCallback

    from engine import checkpoints
    from engine.curves import read_history
    from engine.models import load_model
    from engine.monitor import SftMonitor
    from engine.rollout import Rollout
    from engine.trainer import CarefulSFTTrainer

    state, autocast = train_grpo.take_machine(flags, recipe.BF16)
    accumulation = accumulation_steps(recipe, state.num_processes)
    with state.main_process_first():
        if state.is_main_process and (output.exists() or flags.demo and not flags.resume):  # else `begin` makes it
            lock(output)
        checkpoint = checkpoints.find(output, recipe, flags.resume)
        if flags.demo:
            pretraining.provide(output / "base", flags.model, flags.dataset)

    # ---- data, model, trainer
    test = load_questions(recipe.DATASET, "test")
    model, tokenizer = load_model(recipe.MODEL)
    traces = keep_usable(traces, "--traces", tokenizer, test, recipe)
    if mix:
        mix = keep_usable(mix, "--mix", tokenizer, test, recipe)
        mix = draw_mix(mix, len(traces), recipe.MIX_SHARE, recipe.SEED)
    trainer = CarefulSFTTrainer(
        model=model,
        args=sft_config(recipe, state.device.type == "cpu", autocast is not None, accumulation),
        train_dataset=Dataset.from_list(traces + mix),
        processing_class=tokenizer,
        peft_config=train_grpo.lora_config(recipe, model) if recipe.USE_LORA else None,
    )
    trainer.remove_callback(PrinterCallback)  # it would print ten keys a step
    checkpoints.check_disk(output, trainer.model, recipe.SAVE_LIMIT)

    # ---- before, train, save, after
    results = checkpoints.begin(output, recipe, checkpoint) if state.is_main_process else {}
    begun = checkpoints.step_of(checkpoint) if checkpoint else 0
    history = read_history(output, until=begun) if checkpoint else []
    monitor = SftMonitor(recipe, trainer, Rollout(recipe.FAST_ROLLOUT), test, begun, history)
    if state.is_main_process:
        monitor.print_header(f"{len(traces)} traces of {recipe.TRACES}, {len(mix)} conversations mixed in")
    train_grpo.carry_out(monitor, results, checkpoint, OUT_OF_MEMORY)


if __name__ == "__main__":
    run(main)
