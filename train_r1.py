"""The whole path in one command: measure, cold start, learnable questions, GRPO, average, and measure again.

It runs the other scripts one after the other, each in a numbered folder of the output, and prints every command before
it runs it. In the end report.md holds a table with a row for every stage, and report.png shows it.

    python train_r1.py            # one CUDA GPU or several, Qwen2.5-0.5B-Instruct, Chinese GSM8K
    python train_r1.py --small    # small steps, nearly those that were measured; with --cpu some hours on two cores
    python train_r1.py --demo     # a tiny base model on made problems: minutes on any machine

The same command goes on where it was stopped. Each stage asks training questions that no stage before it has asked;
the runs of a round train on its learnable ones several times. The development questions tell how good each stage is.
The whole test split is asked in the last stage only, of the first model and of the last one. On the way each training
asks 50 test questions, to be looked at; they decide nothing.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import make_traces
import train_grpo
import train_sft
from engine import constants as all_constants
from engine import demo, pretraining
from engine.accuracy import needs_cold_start
from engine.console import UserError, run
from engine.fingerprints import fingerprint_rows, fingerprint_weights
from engine.folder import lock
from engine.questions import load_splits, pairs_of
from engine.report import draw_report, write_report
from engine.stages import Command, Stage, Stages, check_disk, find_workers, keep_settings, read_json
from engine.traces import write_data

# ------------------------------------------------------------------------------------------------------- the path
MODEL: str = train_grpo.MODEL  # --model
DATASET: str = train_grpo.DATASET  # --dataset
OUTPUT_DIR: str = "output/r1"  # --output
SEED: int = 1  # of the order of the questions and of every stage; --seed
DEV_QUESTIONS: int = train_grpo.DEV_QUESTIONS  # they tell how good each stage is
MEASURE_SAMPLES: int = 4  # answers at temperature 1 to each question that is measured, for pass@1

# Cold start: the model answers behind WORKED_EXAMPLE, and learns to give its right answers without the example
COLD_START: Literal["auto", "always", "never"] = "auto"  # auto: where strict is less than half of flexible
COLD_QUESTIONS: int = 240  # new ones; with 29 right answers a real model was as good greedily as with 189, not sampled
COLD_EXAMPLE: bool = True  # False: it answers behind the system prompt alone

# Rounds of GRPO, each on questions that the model sometimes solves
ROUNDS: int = 3
QUESTIONS_PER_ROUND: int = 1600  # new ones that it is asked; about a quarter of them is learnable
RUNS_PER_ROUND: int = 2  # from different seeds; the mean of their weights goes on
STEPS: int = 40  # of each run

# The test questions
SAMPLED_QUESTIONS: int = 300  # so many are also sampled, MEASURE_SAMPLES times; all are answered greedily

# What differs from the constants of train_sft.py and of train_grpo.py
SFT: dict = {"TEST_QUESTIONS": 50}
GRPO: dict = {"TEST_QUESTIONS": 50}

# --small: nearly the sizes of the runs that docs/results.md tells of
SMALL = {
    "OUTPUT_DIR": "output/r1-small",
    "QUESTIONS_PER_ROUND": 240,
    "SFT": SFT | {"USE_LORA": True, "MICRO_BATCH": 2, "MAX_COMPLETION_TOKENS": 320, "GRADIENT_CHECKPOINTING": False},
    "GRPO": GRPO
    | {
        "QUESTIONS_PER_STEP": 4,
        "MICRO_BATCH": 2,  # 11 GB of memory on a CPU, each of two runs side by side
        "GRADIENT_CHECKPOINTING": False,
        "MAX_COMPLETION_TOKENS": 320,
        "USE_LORA": True,
        "LORA_LEARNING_RATE": 1e-4,
        "WARMUP_STEPS": 2,
        "SAVE_EVERY": 5,
        "EVAL_EVERY": 1000,  # before and after only: 200 development questions take a CPU as long as three steps
    },
}
# --demo: a tiny base model, which does not know the format
DEMO = {
    "OUTPUT_DIR": "output/r1-demo",
    "DEV_QUESTIONS": demo.RECIPE["DEV_QUESTIONS"],
    "COLD_QUESTIONS": 160,
    "COLD_EXAMPLE": False,  # it has never read an example
    "ROUNDS": 1,
    "QUESTIONS_PER_ROUND": 640,
    "SAMPLED_QUESTIONS": 120,
    "GRPO": GRPO | {"EVAL_EVERY": 20},
}


def configure(argv: list[str] | None, constants: dict[str, Any]) -> tuple[argparse.Namespace, SimpleNamespace]:
    """The flags and the checked constants of this path. Raises UserError for what cannot be."""
    parser = argparse.ArgumentParser(description="the whole path, from a model to a better one", allow_abbrev=False)
    parser.add_argument("--model", help=f"hub id or folder (default: {MODEL})")
    parser.add_argument("--dataset", help=f"hub id, folder or file (default: {DATASET})")
    parser.add_argument("--output", help=f"folder of the path (default: {OUTPUT_DIR}, or -small, -demo behind it)")
    parser.add_argument("--seed", type=int, help=f"another seed (default: {SEED})")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_true", help="fewer questions in small steps, LoRA")
    sizes.add_argument("--demo", action="store_true", help="a tiny base model on made problems: minutes, any machine")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU (hours with --small)")
    flags = parser.parse_args(argv)
    by_flag = {"MODEL": flags.model, "DATASET": flags.dataset, "OUTPUT_DIR": flags.output, "SEED": flags.seed}
    sized = SMALL if flags.small else DEMO if flags.demo else {}
    script = sys.modules[__name__]
    recipe = all_constants.make_recipe(all_constants.constants_of(script), sized, constants, by_flag)
    all_constants.check_constants(vars(recipe), script)
    if recipe.SEED > 10**7:
        raise UserError(f"SEED = {recipe.SEED}: the runs need seeds of their own, made of it; choose one below 10**7")
    how = ["--demo"] * flags.demo + ["--cpu"] * flags.cpu
    inputs = {"--model": recipe.MODEL, "--dataset": recipe.DATASET}
    if flags.demo:  # it makes its own, where none are given
        inputs = {"--model": flags.model, "--dataset": flags.dataset}
        base = Path(recipe.OUTPUT_DIR, "base")
        recipe.MODEL, recipe.DATASET = flags.model or str(base / "untaught"), flags.dataset or demo.folders(base)[1]
    asked = [word for flag, value in inputs.items() if value for word in (flag, value)] + how
    train_sft.configure([*asked, "--traces", "-"], recipe.SFT)  # each checks what is given to it
    recipe.grpo = train_grpo.configure(asked, recipe.GRPO)[1]
    return flags, recipe


def make_plan(recipe: SimpleNamespace, tested: int, workers: int) -> dict[str, Stage]:
    """The stages in their order. `tested` is the number of test questions; so many `workers` go side by side."""
    at_once = min(workers, recipe.RUNS_PER_ROUND)
    measured = recipe.DEV_QUESTIONS * (1 + recipe.MEASURE_SAMPLES)
    grpo, samples, runs = recipe.grpo, make_traces.SAMPLES, recipe.RUNS_PER_ROUND
    # roughly: to train on an answer takes twice as long as to draw it
    learned = 3 * recipe.STEPS * grpo.QUESTIONS_PER_STEP * grpo.COMPLETIONS_PER_QUESTION
    each = f"x {1 + recipe.MEASURE_SAMPLES} answers"
    plan = {"measure": Stage(f"{recipe.DEV_QUESTIONS} development questions {each}", measured)}
    if recipe.COLD_START != "never":
        where = " behind WORKED_EXAMPLE" if recipe.COLD_EXAMPLE else ""
        cold = recipe.COLD_QUESTIONS
        plan["traces"] = Stage(f"{cold} training questions x {samples} answers{where}", cold * samples)
        plan["cold-start"] = Stage("fine-tuning of the untouched model on its right answers", 2 * cold + measured)
    for number in range(1, recipe.ROUNDS + 1):
        asked = recipe.QUESTIONS_PER_ROUND
        plan[f"learnable-{number}"] = Stage(f"{asked} new training questions x {samples} answers", asked * samples)
        what = f"{runs} x {recipe.STEPS} steps of GRPO on those that it sometimes solves"
        plan[f"grpo-{number}"] = Stage(what, learned * math.ceil(runs / at_once) + measured * (runs == 1))
        if runs > 1:
            plan[f"mean-{number}"] = Stage(f"the mean of the {runs} models", measured)
    sampled = min(recipe.SAMPLED_QUESTIONS, tested) * recipe.MEASURE_SAMPLES
    plan["test"] = Stage(f"{tested} test questions, before and after", 2 * (tested + sampled) // min(workers, 2))
    return plan


# ------------------------------------------------------------------------------------------------------ the stages
def prepare(flags: argparse.Namespace, recipe: SimpleNamespace) -> Stages:
    """Lock the folder, write the data set of the path into it, check what it needs, and print the plan.

    Raises:
        UserError: the path cannot be gone; the message says why.
    """
    output, data = Path(recipe.OUTPUT_DIR), Path(recipe.OUTPUT_DIR, "data")
    lock(output)
    if flags.demo:
        pretraining.prepare_demo(output / "base", recipe.MODEL, recipe.DATASET)
    train, dev, test = (pairs_of(rows) for rows in load_splits(recipe.DATASET, recipe.DEV_QUESTIONS))
    settings = {name: value for name, value in vars(recipe).items() if name.isupper() and name != "OUTPUT_DIR"}
    settings |= {"weights": fingerprint_weights(recipe.MODEL), "questions": fingerprint_rows([train, dev, test])}
    settings |= {f"{name} of train_grpo.py": value for name, value in vars(recipe.grpo).items() if name not in settings}
    makes_the_plan = ("COLD_START", "ROUNDS", "RUNS_PER_ROUND")
    keep_settings(output, settings, fixed=("MODEL", "DATASET", "SEED", "weights", "questions", *makes_the_plan))
    if not (data / "test.jsonl").exists():  # the last to be written
        shuffled = random.Random(recipe.SEED).sample(train, len(train))
        write_data(data, train=shuffled, validation=dev, test=test)
    wanted = recipe.COLD_QUESTIONS * (recipe.COLD_START != "never") + recipe.ROUNDS * recipe.QUESTIONS_PER_ROUND
    if wanted > len(train):
        raise UserError(
            f"{recipe.DATASET!r} has {len(train)} training questions, fewer than the {wanted} that this path asks; "
            "lower COLD_QUESTIONS, ROUNDS or QUESTIONS_PER_ROUND"
        )
    workers = find_workers(flags.cpu, flags.demo)
    at_once = min(len(workers), recipe.RUNS_PER_ROUND)
    stages = Stages(output, make_plan(recipe, len(test), len(workers)), workers)
    print(f"model      {recipe.MODEL}")
    print(f"data       {recipe.DATASET}: {len(train)} training questions, of which {wanted} are asked")
    models = 1 + recipe.ROUNDS * (recipe.RUNS_PER_ROUND + (recipe.RUNS_PER_ROUND > 1))
    checkpoints = at_once * (max(recipe.grpo.SAVE_LIMIT, 2) + 1)
    print(f"disk       {check_disk(output, recipe.MODEL, models, checkpoints, recipe.grpo.USE_LORA)}")
    print(f"output     {output}")
    for number, (name, stage) in enumerate(stages.plan.items(), start=1):
        print(f"{number:7}    {name}: {stage.what}", flush=True)
    return stages


def main(argv: list[str] | None = None, **constants: Any) -> None:
    """Go the path. `constants` replace those above by name."""
    flags, recipe = configure(argv, constants)
    stages = prepare(flags, recipe)
    cpu, how = ["--cpu"] * flags.cpu, ["--demo"] * flags.demo + ["--cpu"] * flags.cpu
    on_data = ["--dataset", str(stages.output / "data")]
    shared = {name: getattr(recipe.grpo, name) for name in ("MAX_COMPLETION_TOKENS", "BF16")}

    def evaluate(model: str | Path, folder: Path, *more: str) -> Command:
        return Command("evaluate", [str(model), *on_data, "--output", str(folder), *more, *cpu], shared)

    def measure(model: str | Path, stage: str) -> Command:
        samples = ["--split", "dev", "--samples", str(recipe.MEASURE_SAMPLES)]
        return evaluate(model, stages.folder(stage) / "dev", *samples)

    def ask(model: str | Path, stage: str, count: int, *more: str) -> Command:
        argv = ["--model", str(model), *on_data, "--questions", stages.take_questions(stage, count)]
        argv += ["--output", str(stages.folder(stage)), "--seed", str(recipe.SEED), *more, *how]
        return Command("make_traces", argv, shared)

    # ---- how good is the model?
    model = recipe.MODEL
    stages.run("measure", [measure(model, "measure")])
    figures = read_json(stages.folder("measure") / "dev" / "eval.json")
    said = f"strict {figures['strict']:.1%}, flexible {figures['flexible']:.1%} of the development questions"

    # ---- a cold start, where it can do more than it can put into the format
    if recipe.COLD_START == "always" or recipe.COLD_START == "auto" and needs_cold_start(figures):
        print(f"cold start: {said}", flush=True)
        stages.run("traces", [ask(model, "traces", recipe.COLD_QUESTIONS, *["--example"] * recipe.COLD_EXAMPLE)])
        traces, taught = stages.folder("traces") / "traces.jsonl", stages.folder("cold-start")
        argv = ["--model", model, *on_data, "--traces", str(traces), "--output", str(taught)]
        argv += ["--seed", str(recipe.SEED), *how]
        stages.run("cold-start", [Command("train_sft", argv, recipe.SFT), measure(taught, "cold-start")])
        model = taught
    elif recipe.COLD_START == "auto":
        for name in ("traces", "cold-start"):
            stages.skip(name, said)

    # ---- rounds: which new questions does it sometimes solve? GRPO on them
    rounds = []
    for number in range(1, recipe.ROUNDS + 1):
        learnable, grpo, mean = (f"{name}-{number}" for name in ("learnable", "grpo", "mean"))
        stages.run(learnable, [ask(model, learnable, recipe.QUESTIONS_PER_ROUND)])
        questions = stages.folder(learnable) / "learnable" / "train.jsonl"
        count = len(questions.read_text(encoding="utf-8").splitlines()) if questions.exists() else 0
        if count < recipe.grpo.QUESTIONS_PER_STEP:
            stages.undo(learnable)
            raise UserError(
                f"{count} of {recipe.QUESTIONS_PER_ROUND} questions are learnable, fewer than the "
                f"{recipe.grpo.QUESTIONS_PER_STEP} of a step; raise QUESTIONS_PER_ROUND in train_r1.py"
            )
        rounds.append([stages.folder(grpo) / f"run-{each}" for each in range(1, recipe.RUNS_PER_ROUND + 1)])
        lanes = []
        for seed, folder in enumerate(rounds[-1], start=100 * recipe.SEED + number * recipe.RUNS_PER_ROUND):
            argv = ["--model", str(model), "--dataset", str(stages.folder(learnable) / "learnable")]
            argv += ["--output", str(folder), "--max-steps", str(recipe.STEPS), "--seed", str(seed)]
            lanes.append([Command("train_grpo", argv + how, recipe.GRPO)])
        if len(lanes) == 1:
            [model] = rounds[-1]
            stages.run(grpo, [*lanes[0], measure(model, grpo)])
            continue
        stages.run(grpo, *lanes)
        model = stages.folder(mean) / "model"
        average = Command("engine.average", [*map(str, rounds[-1]), "--output", str(model)], {})
        stages.run(mean, [average, measure(model, mean)])

    # ---- the test questions
    lanes = []
    for when, asked in (("before", recipe.MODEL), ("after", model)):
        folder, some = stages.folder("test") / when, ["--questions", f":{recipe.SAMPLED_QUESTIONS}"]
        samples = ["--samples", str(recipe.MEASURE_SAMPLES)]
        sampled = evaluate(asked, folder.with_name(f"{when}-sampled"), *some, *samples)
        lanes.append([evaluate(asked, folder), sampled])
    stages.run("test", *lanes)
    print(f"\n{write_report(stages, Path(model))}")
    draw_report(stages, rounds, stages.output / "report.png")
    print(f"written    {stages.output / 'report.md'}, {stages.output / 'report.png'}")


if __name__ == "__main__":
    run(main)
