"""What the training half of a step costs on real lengths: TRL as it comes against trainer.py, lever by lever.

    python studies/bench_training.py COMPLETIONS.jsonl [--model FOLDER] [--rows 64] [--rounds 3] [--json FILE]
    python studies/bench_training.py COMPLETIONS.jsonl --rows 4 --profile    # more rows, more memory

COMPLETIONS.jsonl holds one `{"question", "completion"}` a line, as evaluate.py's eval.jsonl does. Each row of the step
is a question of its own with its completion, replayed; rewards are made up, so that a given share of the groups (of two
rows) is flat. Seconds are those of forward, backward and optimizer, without generation and rewards. Variants take turns
in one process, each with a fresh model; from the third round on the first one is dropped.
"""

import argparse
import gc
import json
import logging
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
import trl.trainer.utils
from bench_step import CUDA, now  # which finds the project's modules
from datasets import Dataset
from torch.profiler import profile
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.kernels.chunked_logprob import _use_triton

import train_grpo
from engine.models import encode, load_model
from engine.questions import to_conversation
from engine.trainer import CPU_TILE, CarefulTrainer

GROUP, MICRO, LONGEST = 2, 16, 512


class Trimmed(CarefulTrainer):
    """The first lever alone."""

    _prepare_inputs, _compute_loss = GRPOTrainer._prepare_inputs, GRPOTrainer._compute_loss


class Sorted(CarefulTrainer):
    """The first two levers; what TRL does costs the same whatever is flat."""

    def _teaches(self, inputs: dict) -> torch.Tensor:
        return torch.ones_like(inputs["advantages"], dtype=torch.bool)


def labelled_only(device: torch.device) -> bool:
    """For TRL's LM head: project the labelled positions only. Our trainer sees to that by itself."""
    return True


VARIANTS = {  # -> trainer, which positions the LM head projects, share of flat groups: without any, nothing is skipped
    "TRL": (GRPOTrainer, _use_triton, 0.0),
    "TRL, LM head on labelled positions": (GRPOTrainer, labelled_only, 0.0),
    "trimmed": (Trimmed, _use_triton, 0.0),
    "trimmed, sorted": (Sorted, _use_triton, 0.0),
    "trimmed, sorted, skipped; 40 % of groups flat": (CarefulTrainer, _use_triton, 0.4),
    "trimmed, sorted, skipped; 70 % of groups flat": (CarefulTrainer, _use_triton, 0.7),
}


def read_rows(file: Path, tokenizer, rows: int) -> dict[str, list[list[int]]]:
    """Token ids of the first `rows` prompts and completions, the latter with their end token, cut at LONGEST."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:rows] if line]
    if len(lines) < rows:
        sys.exit(f"{file} has {len(lines)} lines, fewer than --rows {rows}")
    prompts = encode(tokenizer, [to_conversation(line["question"]) for line in lines])
    texts = tokenizer([line["completion"] for line in lines], add_special_tokens=False)["input_ids"]
    return {"prompt_ids": prompts, "completion_ids": [(ids + [tokenizer.eos_token_id])[:LONGEST] for ids in texts]}


def make_rewards(rows: int, flat: float) -> list[float]:
    """One reward a row: equal within the given share of the groups, always the same ones; different in the others."""
    groups = rows // GROUP
    chosen = random.Random(0).sample(range(groups), round(flat * groups))
    return [0.0 if row // GROUP in chosen else float(row % GROUP) for row in range(rows)]


class Clock(TrainerCallback):
    """Seconds of a step's training half: from the end of `generate_and_score` to the end of the step."""

    def __init__(self, record: profile | nullcontext) -> None:
        self.record, self.seconds = record, 0.0

    def watch(self, generate_and_score: Callable) -> Callable:
        def watched(inputs):
            made = generate_and_score(inputs)
            self.record.__enter__()
            self.start = now()
            return made

        return watched

    def on_step_end(self, *_, **__) -> None:
        self.seconds = now() - self.start
        self.record.__exit__(None, None, None)


def run(variant: str, flags: argparse.Namespace, record: profile | nullcontext | None = None) -> dict:
    """One step of a fresh model: `seconds`, `tokens` (rows x columns) through the body, `head` positions projected."""
    kind, trl.trainer.utils._use_triton, flat = VARIANTS[variant]
    model, tokenizer = load_model(flags.model)
    batch = read_rows(flags.completions, tokenizer, flags.rows)
    rewards = make_rewards(flags.rows, flat)
    config = GRPOConfig(
        tempfile.gettempdir(),  # nothing is written
        use_cpu=not CUDA,
        bf16=True,
        per_device_train_batch_size=min(MICRO, flags.rows),
        gradient_accumulation_steps=max(flags.rows // MICRO, 1),
        activation_checkpointing=flags.checkpointing,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        loss_type="dapo",
        beta=0.0,
        max_steps=1,
        learning_rate=1e-6,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock(record or nullcontext())
    trainer = kind(
        model=model,
        reward_funcs=lambda completion_ids, **_: rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [to_conversation("")] * flags.rows}),
        processing_class=tokenizer,
        rollout_func=lambda prompts, trainer: batch | {"logprobs": None},  # prompts that TRL did not ask for
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer._generate_and_score_completions = clock.watch(trainer._generate_and_score_completions)
    tokens, head, apply = [], [], trl.trainer.utils._ChunkedLogProbFunction.apply
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    counted = SimpleNamespace(apply=lambda hidden, *rest: head.append(len(hidden)) or apply(hidden, *rest))
    original, trl.trainer.utils._ChunkedLogProbFunction = trl.trainer.utils._ChunkedLogProbFunction, counted
    try:
        trainer.train()
    finally:
        trl.trainer.utils._ChunkedLogProbFunction, trl.trainer.utils._use_triton = original, _use_triton
    if variant in ("trimmed", "trimmed, sorted"):
        assert sum(head) == sum(map(len, batch["completion_ids"])), "not every completion token was scored, or others"
    del trainer, model
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return {"seconds": clock.seconds, "tokens": sum(tokens), "head": sum(head)}


def show_profile(flags: argparse.Namespace) -> None:
    """Where the time of one trimmed step goes: self CPU time by group of operators."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * CUDA
    record = profile(activities=activities, record_shapes=True)
    seconds = run("trimmed, sorted", flags, record)["seconds"]
    vocabulary = load_model(flags.model)[0].config.vocab_size
    tile = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE if CUDA else CPU_TILE
    widths = {min(tile, vocabulary), vocabulary % tile}  # of the LM head's tiles

    def group(event) -> str:
        name = event.key.removeprefix("aten::")
        product = name in ("mm", "addmm", "addmm_", "bmm", "linear", "matmul")
        if any(size in widths for shape in event.input_shapes for size in shape if isinstance(size, int)):
            return "LM head, products" if product else "LM head, the rest"
        if product or "mkldnn" in name:
            return "layers, products"
        if "attention" in name:
            return "layers, attention"
        if name in ("copy_", "clone", "cat", "fill_", "zero_", "add_"):
            return "casts, copies, sums of gradients"
        return "optimizer" if "adam" in name.lower() else "other"

    groups: dict[str, float] = {}
    for event in record.key_averages(group_by_input_shape=True):  # shapes tell the LM head from the layers
        time_us = event.self_device_time_total if CUDA else event.self_cpu_time_total
        groups[group(event)] = groups.get(group(event), 0.0) + time_us / 1e6
    total = sum(groups.values())
    print(f"\nOne trimmed and sorted step, {seconds:.1f} s under the profiler\n")
    print("| operators | s | share |\n|---|---:|---:|")
    for name, spent in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"| {name} | {spent:.1f} | {spent / total:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the training half of a step costs", allow_abbrev=False)
    parser.add_argument("completions", type=Path, help="JSON lines with question and completion")
    parser.add_argument("--model", default=train_grpo.MODEL, help=f"hub id or folder (default: {train_grpo.MODEL})")
    parser.add_argument(
        "--rows", type=int, default=64, help=f"completions of the step, a multiple of {MICRO}, or fewer"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=1, help="how often the variants take turns")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of activations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured figure there as well")
    parser.add_argument("--profile", action="store_true", help="instead: where the time of one step goes")
    flags = parser.parse_args()
    if flags.rows % min(MICRO, flags.rows) or flags.rows % GROUP:
        parser.error(f"--rows {flags.rows} is neither a multiple of {MICRO} nor an even number below it")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"{machine}; {versions}; {time.strftime('%Y-%m-%d')}", flush=True)
    if flags.profile:
        return show_profile(flags)

    results: dict[str, list[dict]] = {name: [] for name in flags.variants}
    for turn in range(flags.rounds):
        for name, measured in results.items():
            measured.append(run(name, flags))
            print(f"  round {turn + 1}, {name}: {measured[-1]['seconds']:.1f} s", flush=True)
    kept = {name: measured[flags.rounds > 2 :] for name, measured in results.items()}
    first = flags.variants[0]  # what the others are compared with
    base = statistics.median(one["seconds"] for one in kept[first])
    print(
        f"\nThe training half of {flags.rows} rows, micro batches of {min(MICRO, flags.rows)}, dapo, bf16, "
        f"checkpointing {'on' if flags.checkpointing else 'off'}; medians of {len(kept[first])}\n\n"
        "| variant | tokens computed | LM-head positions | s | spread | times as fast |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, measured in kept.items():
        seconds = [one["seconds"] for one in measured]
        median = statistics.median(seconds)
        print(
            f"| {name} | {measured[0]['tokens']} | {measured[0]['head']} | {median:.1f} | "
            f"{min(seconds):.1f} - {max(seconds):.1f} | {base / median:.2f} |"
        )
    if flags.json:
        figures = {"machine": machine, "versions": versions, "rows": flags.rows, "checkpointing": flags.checkpointing}
        flags.json.write_text(json.dumps(figures | {"rounds": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
