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
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

STAGES = {  # folder -> what the table calls it, in the order of the commands
    "zero": "(a) base, GRPO: R1-Zero",
    "cold-traces": "",
    "cold": "(b) base, cold start",
    "rl": "(b) then GRPO",
    "traces": "",
    "sft": "(b) base, fine-tuned on that model's traces",
    "rl-again": "(b) then GRPO again: R1",
    "distilled": "(c) student, fine-tuned on the same traces",
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
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    done.write_text(json.dumps(round(time.perf_counter() - began, 1)))


def read_stage(folder: Path) -> dict:
    """`{"seconds", "before", "after"}` of a finished stage; traces have neither accuracy, but their number."""
    figures = {"seconds": json.loads((folder / "seconds.json").read_text(encoding="utf-8"))}
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return figures | {"before": results["before"], "after": results["after"]}
    return figures | {"traces": len((folder / "traces.jsonl").read_text(encoding="utf-8").splitlines())}


def table(runs: dict[int, dict]) -> list[str]:
    """Held-out strict accuracy after each stage, % with its 95 % interval, and how long it took.

    Args:
        runs: seed -> stage -> what `read_stage` says.
    """

    def row(title: str, stage: str, when: str) -> str:
        cells, seconds = [], " / ".join(f"{stages[stage]['seconds']:.0f}" for stages in runs.values())
        for stages in runs.values():
            low, high = stages[stage][when]["strict_ci95"]
            cells.append(f"{100 * stages[stage][when]['strict']:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        return f"| {title} | {' | '.join(cells)} | {seconds if when == 'after' else ''} |"

    lines = [f"| stage | {' | '.join(f'seed {seed}' for seed in runs)} | seconds |", "| --- " * (len(runs) + 2) + "|"]
    lines.append(row("untaught base", "zero", "before"))
    for stage, title in STAGES.items():
        if stage == "distilled":
            lines.append(row("untaught student", "student", "before"))
        if title:
            lines.append(row(title, stage, "after"))
        else:
            cells = [f"{stages[stage]['traces']} traces" for stages in runs.values()]
            seconds = " / ".join(f"{stages[stage]['seconds']:.0f}" for stages in runs.values())
            lines.append(f"| (b) rejection sampling | {' | '.join(cells)} | {seconds} |")
    return lines


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
