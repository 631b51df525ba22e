"""Arms of GRPO on a real model: the same start, questions and seeds, other constants, each measured before and after.

    python studies/compare_arms.py MODEL DATA --train output/traces/learnable --arms right form --seeds 7 8
    python studies/compare_arms.py MODEL DATA --steps 2 --questions 8 --set MAX_COMPLETION_TOKENS=128    # a try

MODEL and DATA are what `train_grpo.py --model --dataset` takes; --train names another data set to train on, such as
the `learnable` that make_traces.py writes. An arm is a line of ARMS. Its model answers all of DATA's test questions
greedily, and a sample of them with --samples answers at temperature 1. A few points of 300 questions are chance: read
the sign test and the interval. Below the table each arm stands against the first one, over all seeds. Stopped at any
time, the same command goes on.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from study_rewards import EQUAL, TUTORIAL, WEIGHTED
from train_with import read_constants

import evaluate
import train_grpo
import train_r1
from engine.accuracy import compare, compare_samples, read_answers
from engine.checkpoints import read_results, write_text
from engine.console import UserError, run
from engine.questions import load_questions, load_splits, pairs_of
from engine.report import percent
from engine.traces import write_data
from rewards import REWARD_WEIGHTS

ARMS = {  # name -> the constants of train_grpo.py in which it departs from SMALL
    "right": {"REWARD_WEIGHTS": REWARD_WEIGHTS},  # right answers alone are paid
    "form": {"REWARD_WEIGHTS": [0.1, 0.1, 0.1, 0.1, 1.0, 0.0]},
    "weighted": {"REWARD_WEIGHTS": WEIGHTED},
    "tutorial": {"REWARDS": TUTORIAL, "REWARD_WEIGHTS": EQUAL},
    "full": {"USE_LORA": False, "LEARNING_RATE": 1e-6},
    "full-fast": {"USE_LORA": False, "LEARNING_RATE": 3e-6},
}
SMALL = train_r1.SMALL["GRPO"] | {  # a step takes one core one to two minutes; each arm is measured before and after
    "SAVE_EVERY": 2,
    "SAVE_LIMIT": 2,
    "SAMPLE_EVERY": 5,
}
WATCHED = 16  # development and test questions that a run itself looks at; nothing here rests on them


def write_questions(train: str, test: str, count: int, folder: Path) -> str:
    """A data set folder: the training questions of `train`, and `count` of its development questions and of the test
    questions of `test`, always the same."""
    train_rows, dev_rows, _ = load_splits(train, train_grpo.DEV_QUESTIONS)
    held_out = (pairs_of(rows) for rows in (dev_rows, load_questions(test, "test")))
    dev, tested = (random.Random(0).sample(pairs, min(count, len(pairs))) for pairs in held_out)
    write_data(folder, train=pairs_of(train_rows), validation=dev, test=tested)
    return str(folder)


def claim(output: Path, asked: dict) -> None:
    """Note what `output` is of. Raises UserError where it is of something else: its figures would pass for these."""
    file = output / "asked.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    asked = json.loads(json.dumps(asked, default=lambda reward: reward.__name__))
    for name, value in asked.items():
        if name in before and before[name] != value:
            raise UserError(f"{output} was begun with {name} {before[name]!r}, not {value!r}; name another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(before | asked) + "\n")


def measure(model: str, data: dict[str, tuple[str, int]], folder: Path, cpu: list[str]) -> dict[str, dict]:
    """evaluate.py's figures for a model, unless `folder` holds them.

    Args:
        data: name -> a data set, and the answers at temperature 1 to each of its questions.
    """
    measured = {}
    for name, (dataset, samples) in data.items():
        file = folder / name / "eval.json"
        if not file.exists() or samples and "samples" not in json.loads(file.read_text(encoding="utf-8")):
            print(f"\n===== {folder.name}: {name}", flush=True)
            where = ["--dataset", dataset, "--output", str(file.parent), "--samples", str(samples)]
            evaluate.main([model, *where, *cpu])
        measured[name] = json.loads(file.read_text(encoding="utf-8"))
    return measured


def pooled(folders: list[Path]) -> list[dict]:
    """For each question the sampled answers of all models that `measure` has measured in these folders."""
    rows = zip(*(read_answers(folder / "sampled") for folder in folders), strict=True)
    return [{"samples": [answer for row in of_one for answer in row["samples"]]} for of_one in rows]


def row(name: str, measured: dict[str, dict], changed: str = "", results: dict | None = None) -> str:
    """A line of the table."""
    greedy, sampled = measured["greedy"], measured["sampled"]
    cells = [name, percent(greedy, "strict"), f"{greedy['flexible']:.1%}", f"{greedy['format']:.1%}"]
    cells += [f"{greedy['mean_tokens']:.0f}", f"{greedy['truncated']:.1%}", changed]
    cells += [percent(sampled, key) if key in sampled else "" for key in ("mean", "pass")]
    minutes = f"{results['train_seconds'] / 60:.0f} min, {results['peak_memory_gb']:.1f} GB" if results else ""
    return f"| {' | '.join([*cells, minutes])} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="arms of GRPO on a real model", allow_abbrev=False)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("dataset", help="hub id or folder")
    parser.add_argument("--train", help="data set to train on (default: the same)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["right", "form"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[7, 8], help="of each arm")
    parser.add_argument("--steps", type=int, default=40, help="of each arm")
    parser.add_argument("--questions", type=int, default=300, help="test questions that are sampled")
    parser.add_argument("--samples", type=int, default=4, help="answers to each of these at temperature 1; 0: none")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="constants of all arms")
    parser.add_argument("--output", type=Path, default=Path(evaluate.__file__).parent / "output" / "arms")
    parser.add_argument("--cpu", action="store_true")
    flags = parser.parse_args(argv)
    cpu, output, recipe = ["--cpu"] * flags.cpu, flags.output, SMALL | read_constants(flags.set)
    names = ("model", "dataset", "train", "steps", "questions", "samples", "set")
    claim(output, {name: getattr(flags, name) for name in names} | {f"arm {arm}": ARMS[arm] for arm in flags.arms})
    questions = write_questions(flags.train or flags.dataset, flags.dataset, WATCHED, output / "questions")
    sample = write_questions(flags.dataset, flags.dataset, flags.questions, output / "sample")
    data = {"greedy": (flags.dataset, 0), "sampled": (sample, flags.samples)}

    head = ["model", "strict", "flexible", "format", "tokens", "cut off", "against before", "pass@1"]
    head += [f"pass@{flags.samples}", "training"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines.append(row("before", measure(flags.model, data, output / "before", cpu)))
    measured_in = {arm: [output / f"after-{arm}-{seed}" for seed in flags.seeds] for arm in flags.arms}
    for arm, seed in ((arm, seed) for arm in flags.arms for seed in flags.seeds):
        folder, after = output / f"{arm}-{seed}", output / f"after-{arm}-{seed}"
        if not read_results(folder).get("finished"):
            print(f"\n===== {folder.name}", flush=True)
            where = ["--model", flags.model, "--dataset", questions, "--output", str(folder)]
            where += ["--max-steps", str(flags.steps), "--seed", str(seed)]
            train_grpo.main([*where, *cpu, *["--resume"] * any(folder.glob("checkpoint-*"))], **recipe | ARMS[arm])
        figures = measure(str(folder), data, after, cpu)
        changed = compare(*(read_answers(each / "greedy") for each in (after, output / "before")))
        lines.append(row(folder.name, figures, changed, read_results(folder)))
    lines.append("")
    for arm in flags.arms[1:] * (flags.samples > 0):
        difference = compare_samples(*(pooled(measured_in[each]) for each in (arm, flags.arms[0])))
        lines.append(f"{arm} against {flags.arms[0]}, over {len(flags.seeds)} seeds: {difference}")
    table = "\n".join(lines)
    write_text(output / "table.md", table + "\n")
    print(f"\n{table}\n\nwritten: {output / 'table.md'}")


if __name__ == "__main__":
    run(main)
