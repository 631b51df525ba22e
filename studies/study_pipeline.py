"""DeepSeek-R1's pipeline on the demo, on several seeds: what does each stage make of held-out accuracy?

    python studies/study_pipeline.py              # three seeds
    python studies/study_pipeline.py --seeds 1    # one

  (a) R1-Zero: an untaught base, then GRPO.
  (b) R1: the same base, a cold start on its own right answers, GRPO, rejection sampling from the result, fine-tuning of
      the untaught base on that, GRPO again.
  (c) Distillation: a smaller base learns from the traces of (b)'s first GRPO, or has GRPO to itself.

Every stage is a command that a user can type, printed before it runs, in a process of its own. The two bases are made
once, by the first command that names them. Finished stages are kept in --output: the same command continues an
interrupted study. The table is printed, and written with all figures to pipeline.json.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

STAGES = {  # folder -> what the table calls it, in the order of the commands
    "zero": "(a) base, GRPO: R1-Zero",
    "cold-traces": "(b) right answers of the base",
    "cold": "(b) base, fine-tuned on them: cold start",
    "rl": "(b) then GRPO",
    "traces": "(b) right answers of that",
    "sft": "(b) base, fine-tuned on them",
    "rl-again": "(b) then GRPO: R1",
    "distilled": "(c) student, fine-tuned on the same: distillation",
    "student": "(c) student, GRPO instead",
}


def commands(output: Path, seed: int) -> dict[str, list[str]]:
    """The command of each stage of one seed's chain, by the stage's folder in `output/seed-N`."""
    base, student = output / "base" / "untaught", output / "base" / "student"
    at = {stage: output / f"seed-{seed}" / stage for stage in STAGES}
    scripts = {
        "zero": ["train_grpo.py", "--model", base],
        "cold-traces": ["make_traces.py", "--model", base, "--limit", 160],  # few, as R1's are; GRPO does the rest
        "cold": ["train_sft.py", "--model", base, "--traces", at["cold-traces"] / "traces.jsonl"],
        "rl": ["train_grpo.py", "--model", at["cold"]],
        "traces": ["make_traces.py", "--model", at["rl"]],
        "sft": ["train_sft.py", "--model", base, "--traces", at["traces"] / "traces.jsonl"],
        "rl-again": ["train_grpo.py", "--model", at["sft"]],
        "distilled": ["train_sft.py", "--model", student, "--traces", at["traces"] / "traces.jsonl"],
        "student": ["train_grpo.py", "--model", student],
    }
    common = ["--demo", "--seed", seed, "--output"]
    return {stage: [str(word) for word in [*script, *common, at[stage]]] for stage, script in scripts.items()}


def carry_out(folder: Path, command: list[str]) -> None:
    """Run a stage, unless it has been finished before."""
    done = folder / "seconds.json"
    if done.exists():
        return
    print(f"$ python {shlex.join(command)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    began, used = time.perf_counter(), cpu_seconds()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    seconds = {"wall": time.perf_counter() - began, "cpu": cpu_seconds() - used}
    done.write_text(json.dumps({name: round(value, 1) for name, value in seconds.items()}))


def cpu_seconds() -> float:
    """What all finished stages of this process have computed, which tells more than a clock on a busy machine."""
    times = os.times()
    return times.children_user + times.children_system


def read_stage(folder: Path) -> dict:
    """`{"seconds": {"wall", "cpu"}, "before", "after"}` of a finished stage; traces have a number instead."""
    figures = {"seconds": json.loads((folder / "seconds.json").read_text(encoding="utf-8"))}
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return figures | {"before": results["before"], "after": results["after"]}
    return figures | {"traces": len((folder / "traces.jsonl").read_text(encoding="utf-8").splitlines())}


def table(runs: dict[int, dict]) -> list[str]:
    """Held-out strict accuracy after each stage, % with its 95 % interval, and the seconds that a core worked for it.

    Args:
        runs: seed -> stage -> what `read_stage` says.
    """

    def row(title: str, stage: str, what: str) -> str:
        figures = [stages[stage] for stages in runs.values()]
        cells = [f"{each[what]} traces" if what == "traces" else accuracy(each[what]) for each in figures]
        seconds = "" if what == "before" else " / ".join(f"{each['seconds']['cpu']:.0f}" for each in figures)
        return f"| {title} | {' | '.join(cells)} | {seconds} |"

    lines = [f"| stage | {' | '.join(f'seed {seed}' for seed in runs)} | CPU seconds |"]
    lines.append("| --- " * (len(runs) + 2) + "|")
    for stage, title in STAGES.items():
        if stage in ("zero", "distilled"):  # the first from its base
            lines.append(row("base" if stage == "zero" else "student", stage, "before"))
        lines.append(row(title, stage, "traces" if "traces" in stage else "after"))
    return lines


def accuracy(figures: dict) -> str:
    low, high = (100 * share for share in figures["strict_ci95"])
    return f"{100 * figures['strict']:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="the R1 pipeline on the demo", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="chains, of the seeds 0, 1, ... (default: 3)")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "pipeline")
    flags = parser.parse_args()
    runs: dict[int, dict] = {}
    for seed in range(flags.seeds):
        chain = commands(flags.output, seed)
        for stage, command in chain.items():
            carry_out(flags.output / f"seed-{seed}" / stage, command)
        runs[seed] = {stage: read_stage(flags.output / f"seed-{seed}" / stage) for stage in chain}
        (flags.output / "pipeline.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        print("\n".join(["", *table(runs)]), flush=True)


if __name__ == "__main__":
    main()
