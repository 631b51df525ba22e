"""Does the demo learn on every seed, with fast generation and with TRL's own? A table of whole runs.

    python studies/study_demo.py              # three seeds of each
    python studies/study_demo.py --seeds 1    # a try

All runs start from one base. Finished ones are kept in --output, and the same command goes on with the others.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_grpo
from engine import demo
from engine.checkpoints import read_results
from engine.console import run
from engine.numbers import extract_answer

HEAD = ["generation", "seed", "held-out accuracy", "5分钟多少秒", "median step", "training"]


def row(generation: str, results: dict) -> str:
    """One line of the table, from a run's results.json."""
    before, after = (results[when]["strict"] for when in ("before", "after"))
    probe = " -> ".join(extract_answer(results["probe"][when]) or "none" for when in ("before", "after"))
    cells = [generation, str(results["seed"]), f"{before:.1%} -> {after:.1%}", probe]
    cells += [f"{results['step_seconds']:.2f} s", f"{results['train_seconds']:.0f} s"]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the demo on several seeds", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="runs with each kind of generation (default: 3)")
    parser.add_argument("--steps", type=int, default=demo.RECIPE["MAX_STEPS"], help="of each (default: the demo's)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "output" / "study_demo")
    flags = parser.parse_args(argv)
    model, data = demo.make_demo(flags.output / "base")
    lines = [f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|"]
    for seed in range(flags.seeds):
        for generation, fast in (("rollout.py", True), ("TRL", False)):
            folder = flags.output / f"{generation}-{seed}"
            if not read_results(folder).get("finished"):
                words = ["--demo", "--cpu", "--model", model, "--dataset", data, "--output", str(folder)]
                words += ["--seed", str(seed), "--max-steps", str(flags.steps)]
                words += ["--resume"] * any(folder.glob("checkpoint-*"))
                train_grpo.main(words, FAST_ROLLOUT=fast)
            lines.append(row(generation, read_results(folder)))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    run(main)
