"""What would a step of GRPO reinforce? Advantages of one model's completions under several sets of rewards.

    python studies/study_advantages.py MODEL DATA               # 32 training questions x 8 completions, no training
    python studies/study_advantages.py MODEL DATA --example     # behind prompts.WORKED_EXAMPLE
    python studies/study_advantages.py MODEL DATA --questions 2 # a try

MODEL and DATA are what `train_grpo.py --model --dataset` takes. The completions are drawn once, at temperature 1, and
kept in --output; every set of rewards judges the same ones. The questions are of the training split, always the same.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from real_model import RECIPE
from study_prompts import draw_questions, read_lines, write_lines
from study_rewards import EQUAL, TUTORIAL

import train_grpo
from engine.accuracy import answer
from engine.console import run
from engine.models import load_model, pick_device
from engine.numbers import thinking_of
from engine.questions import to_conversation
from prompts import WORKED_EXAMPLE
from rewards import REWARD_WEIGHTS, REWARDS, correctness_reward

ROOT = Path(__file__).parent.parent

QUESTIONS = 32
FLEXIBLE = 0.5  # of a right answer's pay, for the right number outside the answer block


def weighted(rewards: list[Callable], weights: list[float]) -> Callable[[list[dict]], list[float]]:
    """A set of rewards as GRPO sums it: rows -> one total each."""

    def total(rows: list[dict]) -> list[float]:
        columns = {
            "completions": [[{"role": "assistant", "content": row["completion"]}] for row in rows],
            "prompts": [[{"role": "user", "content": row["question"]}] for row in rows],
            "answer": [row["label"] for row in rows],
        }
        earned = zip(*(reward(**columns) for reward in rewards), strict=True)
        return [sum(weight * value for weight, value in zip(weights, values, strict=True)) for values in earned]

    return total


def gated(rows: list[dict]) -> list[float]:
    """Ours, where the format pays only around a right answer."""
    return [total if row["strict"] else 0.0 for row, total in zip(rows, ours(rows), strict=True)]


def flexible(rows: list[dict]) -> list[float]:
    """Ours, and a part of a right answer's pay for the right number outside the block."""
    outside = [FLEXIBLE * right * (row["flexible"] and not row["strict"]) for row in rows]
    return [total + more for total, more in zip(ours(rows), outside, strict=True)]


ours = weighted(REWARDS, REWARD_WEIGHTS)
right = REWARD_WEIGHTS[REWARDS.index(correctness_reward)] * 2.0  # what the number alone earns
SETS = {  # how the table calls a set of rewards -> rows to totals
    "the tutorial's": weighted(TUTORIAL, EQUAL),
    "ours, equal weights": weighted(REWARDS, EQUAL),
    "ours (`REWARD_WEIGHTS`)": ours,
    f"ours, right outside the block earns {FLEXIBLE:g} of right": flexible,
    "ours, format pays where right only": gated,
    "correctness only": weighted([correctness_reward], [1.0]),
}
CLASSES = {  # of a completion, each in the first that fits
    "right": lambda row: row["strict"],
    "right outside the block": lambda row: row["flexible"],
    "wrong in the format": lambda row: row["format"],
    "cut off": lambda row: row["truncated"],
    "wrong, no format": lambda row: True,
}


def class_of(row: dict) -> str:
    return next(name for name, fits in CLASSES.items() if fits(row))


def advantages(totals: list[float], group: int) -> tuple[list[float], float]:
    """Of each completion, as SCALE_REWARDS = "batch" has them, and the share of groups without spread."""
    groups = [totals[start : start + group] for start in range(0, len(totals), group)]
    spread = stdev(totals)
    values = [(total - fmean(of_one)) / (spread + 1e-4) for of_one in groups for total in of_one]
    return values, fmean(max(of_one) - min(of_one) < 1e-9 for of_one in groups)


def correlation(a: list[float], b: list[float]) -> float:
    """Pearson's, or 0 where one does not vary."""
    mean_a, mean_b = fmean(a), fmean(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    norm = sum((x - mean_a) ** 2 for x in a) ** 0.5 * sum((y - mean_b) ** 2 for y in b) ** 0.5
    return covariance / norm if norm else 0.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="advantages under several sets of rewards", allow_abbrev=False)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("dataset", help="hub id or folder")
    parser.add_argument("--example", action="store_true", help="ask behind prompts.WORKED_EXAMPLE")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of the training split")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "advantages")
    parser.add_argument("--cpu", action="store_true")
    flags = parser.parse_args(argv)

    group = RECIPE["COMPLETIONS_PER_QUESTION"]
    file = flags.output / f"{'example' if flags.example else 'plain'}.jsonl"
    chosen = draw_questions(flags, seed=1)
    if not file.exists():
        import torch

        from engine.rollout import make_sampler

        turns = WORKED_EXAMPLE if flags.example else []
        pairs = [(to_conversation(row["prompt"][-1]["content"], example=turns), row["answer"]) for row in chosen]
        model, tokenizer = load_model(flags.model)
        device, autocast = pick_device(flags.cpu, train_grpo.BF16)
        sampler = make_sampler(model.to(device).eval(), tokenizer, autocast)
        torch.manual_seed(train_grpo.SEED)
        limits = (RECIPE["MAX_COMPLETION_TOKENS"], train_grpo.EVAL_BATCH)
        drawn = [pair for pair in pairs for _ in range(group)]
        write_lines(file, answer(sampler, tokenizer, drawn, *limits, temperature=1.0, title="sampling"))

    rows = read_lines(file)
    found = [class_of(row) for row in rows]
    thinking = [len(thinking_of(row["completion"])) for row in rows]
    head = [f"{name} ({found.count(name)})" for name in CLASSES]
    table = [f"| rewards | {' | '.join(head)} | correlation with thinking | groups without spread |"]
    table.append("|" + " --- |" * (len(CLASSES) + 3))
    for name, judge in SETS.items():
        values, flat = advantages(judge(rows), group)
        cells = []
        for which in CLASSES:
            own = [value for value, its in zip(values, found, strict=True) if its == which]
            cells.append(f"{fmean(own):+.2f}" if own else "")
        table.append(f"| {name} | {' | '.join(cells)} | {correlation(values, thinking):+.2f} | {flat:.0%} |")
    lengths = []
    for which in CLASSES:
        own = [length for length, its in zip(thinking, found, strict=True) if its == which]
        lengths.append(f"{fmean(own):.0f}" if own else "")
    table.append(f"| characters of thinking | {' | '.join(lengths)} | | |")
    print("\n".join(table) + f"\n\nof {file}")


if __name__ == "__main__":
    run(main)
