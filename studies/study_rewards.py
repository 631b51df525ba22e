"""Which rewards teach? The tutorial's and ours, weighed and scaled in several ways, from one base.

    python studies/study_rewards.py                          # 18 runs of a minute or two; docs/rewards.png
    python studies/study_rewards.py --base-steps 140         # the same from a base that computes better
    python studies/study_rewards.py --seeds 1 --steps 2      # a try

Every run is train_grpo.main() on the demo's problems, whose right answers reason over several lines, as real ones do,
and whose sloppy ones take a single line. Finished runs are kept in --output: the same command continues the study.
"""

import argparse
import random
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_grpo
from engine import curves, demo
from engine.checkpoints import read_results
from engine.numbers import extract_answer, parse_number
from rewards import REWARD_MAXIMA, REWARD_WEIGHTS, language_reward

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------ the tutorial's five rewards, as published
# Beside the weights, three things differ from ours: no re.DOTALL, so that `.` ends at a line's end; the text is
# compared, not the number; and without any tag the whole text counts as the answer.
def tutorial_answer(text: str) -> str:
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def mark_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    lines = ("<think>\n", "</think>\n", "<answer>\n", "</answer>\n")
    return [0.125 * sum(message["content"].count(line) == 1 for line in lines) for [message] in completions]


def soft_format_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    pattern = r"<think>.*?</think>\s*<answer>.*?</answer>"
    return [0.5 if re.match(pattern, message["content"]) else 0.0 for [message] in completions]


def hard_format_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    pattern = r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>\n$"
    return [0.5 if re.match(pattern, message["content"]) else 0.0 for [message] in completions]


def digit_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    return [0.5 if tutorial_answer(message["content"]).isdigit() else 0.0 for [message] in completions]


def correctness_reward(completions: list[list[dict]], answer: list[int], **kwargs) -> list[float]:
    pairs = zip(completions, answer, strict=True)
    return [2.0 if tutorial_answer(message["content"]) == str(label) else 0.0 for [message], label in pairs]


TUTORIAL = [mark_reward, soft_format_reward, hard_format_reward, digit_reward, correctness_reward]
TUTORIAL.append(language_reward)  # ours, which is watched in every run and weighs nothing in any

# ----------------------------------------------------------------------------------------------------- the variants
EQUAL = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
WEIGHTED = [1.0, 1.0, 1.0, 1.0, 3.0, 0.0]
VARIANTS = {  # name -> how the table calls it, and the constants of train_grpo.py that it changes
    "tutorial": ("the tutorial's rewards", {"REWARDS": TUTORIAL, "REWARD_WEIGHTS": EQUAL}),
    "batch": ('ours, SCALE_REWARDS = "batch"', {"SCALE_REWARDS": "batch"}),
    "equal": ("ours, equal weights", {"REWARD_WEIGHTS": EQUAL}),
    "weighted": ("ours, correctness 3, the others 1", {"REWARD_WEIGHTS": WEIGHTED}),
    "group": ('ours, SCALE_REWARDS = "group"', {"SCALE_REWARDS": "group"}),
    "none": ('ours, SCALE_REWARDS = "none"', {"SCALE_REWARDS": "none"}),
}


# The demo's own base is always right when it reasons, and any reward that pays right answers brings it to 100 %.
# This one is taught a seventh as long and is right 1 time in 10, as on questions that are hard for a model. And every
# other trace ends in a newline, as the tutorial's prompt does: without one its hard format could never be earned.
BASE_STEPS = 110


def make_base(folder: Path, steps: int) -> tuple[str, str]:
    """The study's base and the demo's data set."""
    write_trace = demo.write_trace

    def write(thought: str, number: int, rng: random.Random) -> str:
        return write_trace(thought, number, rng) + rng.choice(["", "\n"])

    with mock.patch.object(demo, "write_trace", write):
        return demo.make_demo(folder, steps)


def train_variant(variant: str, seed: int, steps: int, base: tuple[str, str], folder: Path) -> None:
    """One run, unless `folder` holds it already; what an interrupted one left is thrown away."""
    done = read_results(folder)
    if done.get("finished") and done["steps"] == steps:
        return
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--demo", "--cpu", "--output", folder, "--seed", seed, "--max-steps", steps]
    flags += ["--model", base[0], "--dataset", base[1]]
    train_grpo.main([str(flag) for flag in flags], **VARIANTS[variant][1])


def figures(folder: Path) -> dict[str, float]:
    """What the table shows of one run."""
    results = read_results(folder)
    looks = [row["heldout/strict"] for row in curves.read_history(folder) if "heldout/strict" in row]
    return {
        "strict %": 100 * results["after"]["strict"],
        "strict % on the way": 100 * fmean(looks),  # the sooner it learns, the higher
        "format %": 100 * results["after"]["format"],
        "tokens": results["after"]["mean_tokens"],
        "300 to the probe": parse_number(extract_answer(results["probe"]["after"]) or "") == 300,  # 5分钟多少秒
    }


def write_table(folders: dict[str, list[Path]]) -> str:
    """A row for each variant: mean ± standard deviation over its seeds."""
    lines = []
    for variant, runs in folders.items():
        rows = [figures(folder) for folder in runs]
        cells = [VARIANTS[variant][0], str(len(rows))]
        *measured, probe = rows[0]
        for name in measured:
            values = [row[name] for row in rows]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.1f}{spread}")
        cells.append(f"{sum(row[probe] for row in rows)} of {len(rows)}")
        lines.append(f"| {' | '.join(cells)} |")
    before = read_results(runs[0])["before"]
    strict, form, tokens = 100 * before["strict"], 100 * before["format"], before["mean_tokens"]
    base = f"| the base | | {strict:.1f} | | {form:.1f} | {tokens:.1f} | |"
    head = f"| rewards | seeds | {' | '.join(rows[0])} |"
    return "\n".join([head, "|" + " --- |" * (2 + len(rows[0])), base, *lines])


def draw(left: Path, right: Path, picture: Path) -> None:
    """The tutorial's rewards beside ours: does the reward rise, and does what it should stand for?"""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    for axes, folder, title, full in zip(
        drawing.subplots(1, 2, sharey=True),
        (left, right),
        ("the tutorial's rewards", "these rewards"),
        (4.0, sum(w * f for w, f in zip(REWARD_WEIGHTS, REWARD_MAXIMA, strict=True))),
        strict=True,
    ):
        history = [
            row | {"share": row["reward/total"] / full} if "reward/total" in row else row
            for row in curves.read_history(folder)
        ]
        curves.draw_curve(axes, history, "share", "C1", "total reward, of the maximum")
        curves.draw_curve(axes, history, "heldout/strict", "C0", "held-out accuracy, 95 % interval")
        axes.set(title=title, xlabel="step", ylim=(0, 0.75))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    picture.parent.mkdir(exist_ok=True)
    drawing.savefig(picture)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compare rewards on the demo", allow_abbrev=False)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    parser.add_argument("--steps", type=int, default=demo.RECIPE["MAX_STEPS"], help="of each run (default: the demo's)")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help=f"the base's schooling ({BASE_STEPS})")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "study")
    flags = parser.parse_args(argv)

    study = flags.output / f"base-{flags.base_steps}"
    base = make_base(study, flags.base_steps)
    folders = {variant: [study / f"{variant}-{seed}" for seed in range(flags.seeds)] for variant in flags.variants}
    for seed in range(flags.seeds):
        for variant in flags.variants:
            print(f"\n===== {VARIANTS[variant][0]}, seed {seed}", flush=True)
            train_variant(variant, seed, flags.steps, base, folders[variant][seed])
    table = write_table(folders)
    (study / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwritten: {study / 'table.md'}")
    if {"tutorial", train_grpo.SCALE_REWARDS} <= set(flags.variants):
        whole = flags.steps == demo.RECIPE["MAX_STEPS"] and flags.base_steps == BASE_STEPS
        picture = (ROOT / "docs" if whole else study) / "rewards.png"
        draw(folders["tutorial"][0], folders[train_grpo.SCALE_REWARDS][0], picture)
        print(f"written: {picture}")


if __name__ == "__main__":
    main()
