"""What a whole GRPO step costs where it matters: a real model, real questions, the rewards and rows that come of it.

    python studies/bench_real_step.py [--model FOLDER] [--dataset FOLDER] [--questions 2] [--rounds 2] [--json FILE]

TRL as it comes under the tutorial's settings, TRL under ours, and this project take turns in one process, each with a
fresh model and one step on the same questions; every round has other ones. Completions are sampled, so they are not
the same ones in each variant: tokens stand beside the seconds. All may be as long as MAX_COMPLETION_TOKENS.
"""

import argparse
import gc
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import transformers
from bench_step import CUDA, watch  # which finds the project's modules
from trl import GRPOConfig, GRPOTrainer

import train_grpo
from engine.models import load_model
from engine.questions import load_questions
from engine.rollout import Rollout
from engine.trainer import CarefulTrainer
from rewards import REWARD_WEIGHTS, REWARDS

GROUP, MICRO = train_grpo.COMPLETIONS_PER_QUESTION, 8
OURS = {"per_device_train_batch_size": MICRO, "beta": 0.0, "loss_type": "dapo", "scale_rewards": "batch"}
VARIANTS = {  # the tutorial: one prompt at a time, and TRL's defaults of its day
    "TRL, tutorial's settings": (
        GRPOTrainer,
        {"per_device_train_batch_size": GROUP, "beta": 0.04, "loss_type": "grpo", "scale_rewards": "group"},
    ),
    "TRL, our settings": (GRPOTrainer, OURS),
    "ours": (CarefulTrainer, OURS),
}


def run(variant: str, flags: argparse.Namespace, turn: int) -> dict:
    """One step of a fresh model: `seconds`, of these `generation`, and `tokens` generated."""
    kind, settings = VARIANTS[variant]
    questions = load_questions(flags.dataset, "train")
    chosen = questions.select(range(turn * flags.questions, (turn + 1) * flags.questions))
    model, tokenizer = load_model(flags.model)
    config = GRPOConfig(
        tempfile.gettempdir(),  # nothing is written
        use_cpu=not CUDA,
        bf16=True,
        gradient_accumulation_steps=flags.questions * GROUP // settings["per_device_train_batch_size"],
        activation_checkpointing=True,
        num_generations=GROUP,
        max_completion_length=train_grpo.MAX_COMPLETION_TOKENS,
        reward_weights=REWARD_WEIGHTS,
        temperature=1.0,
        max_steps=1,
        learning_rate=1e-6,
        seed=turn,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = kind(
        model=model,  # TRL reads its reference model from where this one came
        reward_funcs=REWARDS,
        args=config,
        train_dataset=chosen,
        processing_class=tokenizer,
        rollout_func=Rollout() if kind is CarefulTrainer else None,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    clock, generation, tokens = watch(trainer)
    trainer.train()
    del trainer, model
    gc.collect()
    return {"seconds": clock.steps[0], "generation": sum(generation), "tokens": sum(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description="a whole step of a real model", allow_abbrev=False)
    parser.add_argument("--model", default=train_grpo.MODEL, help=f"hub id or folder (default: {train_grpo.MODEL})")
    parser.add_argument("--dataset", default=train_grpo.DATASET, help=f"(default: {train_grpo.DATASET})")
    parser.add_argument("--questions", type=int, default=2, help=f"of a step, {GROUP} completions each")
    parser.add_argument("--rounds", type=int, default=2, help="how often the variants take turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured figure there as well")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(f"{time.strftime('%Y-%m-%d')}, {flags.questions} x {GROUP} completions, {flags.model}", flush=True)
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for turn in range(flags.rounds):
        for name in VARIANTS:
            made = run(name, flags, turn)
            runs[name].append(made)
            print(f"  round {turn + 1}, {name}: {made}", flush=True)
            if flags.json:
                flags.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    ours = [made["seconds"] for made in runs["ours"]]
    print("\n| variant | step s | generation s | rest s | tokens | ours is so many times as fast, turn by turn |")
    print("|---|---:|---:|---:|---:|---|")
    for name, made in runs.items():
        middle = {key: statistics.median(row[key] for row in made) for key in made[0]}
        ratios = ", ".join(f"{row['seconds'] / own:.2f}" for row, own in zip(made, ours, strict=True))
        rest = statistics.median(row["seconds"] - row["generation"] for row in made)
        print(
            f"| {name} | {middle['seconds']:.1f} | {middle['generation']:.1f} | {rest:.1f} | {middle['tokens']:.0f} "
            f"| {ratios} |"
        )


if __name__ == "__main__":
    main()
