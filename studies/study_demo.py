"""Does the demo learn on every seed, and with fast generation as without it? A table of whole runs.

    python studies/study_demo.py                 # three seeds, with rollout.py's loop and with TRL's own generation
    python studies/study_demo.py --seeds 1       # a try

Every run is the command that a user types, in a process of its own; the first also makes the base that all others
start from. Finished runs are kept in --output: the same command continues an interrupted study.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine.numbers import extract_answer

ROOT = Path(__file__).parent.parent

# The constant edited, as a user would edit it
START = "import train_grpo; train_grpo.FAST_ROLLOUT = {}; train_grpo.run(train_grpo.main)"


def run_demo(folder: Path, base: Path, fast: bool, seed: int) -> None:
    """One run with its output in `folder`, unless it is there; `base` is copied into it, or made by it."""
    if (folder / "wall.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    made = base.exists()
    if made:
        shutil.copytree(base, folder / "base")
    began = time.perf_counter()
    flags = ["--demo", "--cpu", "--seed", str(seed), "--output", str(folder)]
    subprocess.run([sys.executable, "-c", START.format(fast), *flags], cwd=ROOT, check=True)
    (folder / "wall.json").write_text(json.dumps({"seconds": time.perf_counter() - began, "base_made": not made}))
    if not made:
        shutil.copytree(folder / "base", base)


def row(folder: Path, fast: bool) -> str:
    """One line of the table."""
    results, wall = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("results.json", "wall.json"))
    probe = " -> ".join(extract_answer(results["probe"][when]) or "none" for when in ("before", "after"))
    return (
        f"| {'rollout.py' if fast else 'TRL'} | {results['seed']} "
        f"| {results['before']['strict']:.1%} -> {results['after']['strict']:.1%} | {probe} "
        f"| {results['step_seconds']:.2f} s | {results['train_seconds']:.0f} s "
        f"| {wall['seconds']:.0f} s{' with the base' if wall['base_made'] else ''} "
        f"| {results['peak_memory_gb']:.1f} GB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="the demo on several seeds", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="runs with each kind of generation (default: 3)")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "study_demo")
    flags = parser.parse_args()
    lines = [
        "| generation | seed | held-out accuracy | 5分钟多少秒 | median step | training | whole run | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seed in range(flags.seeds):
        for fast in (True, False):
            folder = flags.output / f"{'fast' if fast else 'plain'}-{seed}"
            run_demo(folder, flags.output / "base", fast, seed)
            lines.append(row(folder, fast))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
