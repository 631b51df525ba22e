"""How fast are completions made where it matters: a real model, real questions, rows that end by themselves?

    python studies/bench_generation.py [--model FOLDER] [--dataset FOLDER] [--questions 8] [--rounds 2] [--json FILE]

The rollout of one step: COMPLETIONS_PER_QUESTION completions to each question, as long as the model makes them, at
temperature 1. TRL's own path (`model.generate`, every row runs until the last one ends) and rollout.py's loop take
turns in one process, on the GPU or on the CPU, under the precision that training would use there.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import train_grpo
from engine.models import describe_precision, encode, load_model, pick_device
from engine.questions import load_questions
from engine.rollout import PlainSampler, Sampler


def main() -> None:
    recipe = train_grpo.default_recipe()
    parser = argparse.ArgumentParser(description="generation on a real model", allow_abbrev=False)
    parser.add_argument("--model", default=train_grpo.MODEL, help=f"hub id or folder (default: {train_grpo.MODEL})")
    parser.add_argument("--dataset", default=train_grpo.DATASET, help=f"(default: {train_grpo.DATASET})")
    parser.add_argument("--questions", type=int, default=8, help="distinct questions of the step")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two take turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured figure there as well")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)

    device, autocast = pick_device(cpu=False)
    model, tokenizer = load_model(flags.model)
    model.to(device).eval()
    questions = load_questions(flags.dataset, "train").select(range(flags.questions))
    prompts = [ids for ids in encode(tokenizer, list(questions["prompt"]))]
    prompts = [ids for ids in prompts for _ in range(recipe["COMPLETIONS_PER_QUESTION"])]
    samplers = {
        "TRL (model.generate)": PlainSampler(model, tokenizer, autocast),
        "rollout.py": Sampler(model, tokenizer, autocast),
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, {platform.machine()}; {describe_precision(device, autocast, True)}; {time.strftime('%Y-%m-%d')}\n"
        f"{flags.questions} questions x {recipe['COMPLETIONS_PER_QUESTION']} completions of at most "
        f"{recipe['MAX_COMPLETION_TOKENS']} tokens, {flags.model}",
        flush=True,
    )
    runs: dict[str, list[dict]] = {name: [] for name in samplers}
    for turn in range(flags.rounds):
        for name, sampler in samplers.items():
            torch.manual_seed(turn)
            start = time.perf_counter()
            made = sampler.generate(prompts, recipe["MAX_COMPLETION_TOKENS"], temperature=1.0)
            seconds, lengths = time.perf_counter() - start, [len(row) for row in made]
            run = {"seconds": seconds, "tokens": sum(lengths), "mean": sum(lengths) / len(made), "most": max(lengths)}
            runs[name].append(run)
            print(f"  round {turn + 1}, {name}: {seconds:.1f} s, {run['tokens']} tokens", flush=True)
    rates = {name: [run["tokens"] / run["seconds"] for run in made] for name, made in runs.items()}
    plain, ours = rates.values()
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    print("\n| generation | s | tokens a completion, mean and most | tokens/s | spread |\n|---|---:|---:|---:|---:|")
    for name, made in runs.items():
        middle = {key: statistics.median(run[key] for run in made) for key in made[0]}
        print(
            f"| {name} | {middle['seconds']:.1f} | {middle['mean']:.0f}, {middle['most']:.0f} "
            f"| {statistics.median(rates[name]):.0f} | {min(rates[name]):.0f} - {max(rates[name]):.0f} |"
        )
    print(f"\ntokens/s, turn by turn: {statistics.median(ratios):.2f} x ({min(ratios):.2f} - {max(ratios):.2f})")
    if flags.json:
        flags.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
