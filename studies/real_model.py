"""Does GRPO teach a real model? Arms of a few dozen steps from the same weights, on a GPU or, in hours, on a CPU.

    python studies/real_model.py MODEL DATA --cold output/sft --traces output/traces --mgsm FOLDER
    python studies/real_model.py MODEL DATA --arms tutorial --steps 2 --questions 8    # a try

MODEL and DATA are what `train_grpo.py --model --dataset` takes; --cold is what train_sft.py made of MODEL, --traces
what make_traces.py wrote, in one folder or several: the `sifted` arms train on the `sifted` of all of them, the
questions that were right now and then. For `sifted` take others than --cold was taught (make_traces.py --skip): it
knows the answers of those already.
Every arm is train_grpo.main() under RECIPE. Before and after it its model answers, under the arm's own prompt, the
same sample of test questions, greedily and with --samples answers at temperature 1, and those of MGSM.
A few points of 300 questions are chance: read the sign test, ask more (--questions), repeat it (--seed, --output).
Stopped at any time, the same command goes on.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from study_rewards import CORRECTNESS, EQUAL, TUTORIAL

import evaluate
import prompts
import train_grpo
from engine.checkpoints import write_text
from engine.console import UserError, run
from engine.curves import draw_curve, read_history
from engine.questions import load_questions, to_row

ROOT = Path(__file__).parent.parent

RECIPE = {  # a step takes one core one to two minutes
    "QUESTIONS_PER_STEP": 4,
    "COMPLETIONS_PER_QUESTION": 8,
    "MICRO_BATCH": 2,  # 9 GB of memory; 8 takes 16 to 20
    "GRADIENT_CHECKPOINTING": False,
    "MAX_COMPLETION_TOKENS": 320,
    "USE_LORA": True,
    "LORA_LEARNING_RATE": 1e-4,
    "WARMUP_STEPS": 2,
    "MAX_STEPS": 25,
    "SAVE_EVERY": 2,
    "SAVE_LIMIT": 2,
    "EVAL_EVERY": 100,  # never on the way: each arm is measured before and after it
    "SAMPLE_EVERY": 5,
}
TEST_QUESTIONS = 300  # of the test split, always the same
WATCHED = 16  # test questions of the runs' own `before` and `after`, on which nothing here rests
SAMPLES = 4  # answers a question at temperature 1; --samples

TUTORIAL_PROMPT = """
按照如下格式生成：
<think>
...
</think>
<answer>
...
</answer>
"""  # as published

# name -> its model before it, in the table and as a folder of --output; what then was done; the constants of
# train_grpo.py and of prompts.py that it changes
ARMS = {
    "untouched": ("untouched", "before", "GRPO from there", {}, {}),
    "example": (
        "untouched, asked behind an example",
        "before-example",
        "GRPO from there",
        {},
        {"EXAMPLE": prompts.WORKED_EXAMPLE},
    ),
    "correctness": (
        "untouched, asked behind an example",
        "before-example",
        "GRPO from there, correctness only",
        {"REWARD_WEIGHTS": CORRECTNESS},
        {"EXAMPLE": prompts.WORKED_EXAMPLE},
    ),
    "cold": ("cold start", "before-cold", "GRPO from there", {}, {}),
    "sifted": (
        "cold start",
        "before-cold",
        "GRPO from there, correctness only, on questions it sometimes solves",
        {"REWARD_WEIGHTS": CORRECTNESS},
        {},
    ),
    "sifted-example": (
        "untouched, asked behind an example",
        "before-example",
        "GRPO from there, correctness only, on questions it sometimes solves",
        {"REWARD_WEIGHTS": CORRECTNESS},
        {"EXAMPLE": prompts.WORKED_EXAMPLE},
    ),
    "tutorial": (
        "untouched, asked as in the tutorial",
        "before-tutorial",
        "GRPO with the tutorial's rewards",
        {"REWARDS": TUTORIAL, "REWARD_WEIGHTS": EQUAL},
        {"SYSTEM_PROMPT": TUTORIAL_PROMPT},
    ),
}
NEEDS = {  # the flags without which an arm cannot run
    "cold": {"cold": "what train_sft.py made of the model"},
    "sifted": {"cold": "what train_sft.py made of the model", "traces": "what make_traces.py wrote"},
    "sifted-example": {"traces": "what make_traces.py wrote behind the example"},
}
CONSTANTS = {name: getattr(train_grpo, name) for name in ("REWARDS", "REWARD_WEIGHTS")}
PROMPT = {name: getattr(prompts, name) for name in ("SYSTEM_PROMPT", "EXAMPLE")}


def write_questions(datasets: list[str], folder: Path, count: int) -> str:
    """A data set folder: the training questions of all `datasets`, and `count` of the first one's test questions,
    always the same ones.

    Raises:
        UserError: it holds others already: what was trained and measured in --output is of those.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, sources in (("train", datasets), ("test", datasets[:1])):
        pairs = []
        for dataset in sources:
            rows = load_questions(dataset, split)
            asked = [prompt[-1]["content"] for prompt in rows["prompt"]]
            pairs += zip(asked, rows["answer"], strict=True)
        if split == "test" and count < len(pairs):
            pairs = random.Random(0).sample(pairs, count)
        lines = [to_row(question, label) for question, label in pairs]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file = folder / f"{split}.jsonl"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise UserError(f"{file} holds other questions, of an earlier command; name another folder with --output")
        write_text(file, text)
    return str(folder)


def check_asked(output: Path, asked: dict) -> None:
    """Note what `output` is of. Raises UserError where it is of something else: its figures would be taken for these.

    What an earlier command did not ask for (None), a cold start say, may come now.
    """
    file = output / "asked.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, value in before.items():
        if None not in (value, asked[name]) and value != asked[name]:
            raise UserError(
                f"{output} was begun with {name} {value!r}, not {asked[name]!r}; name another with --output"
            )
    output.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(before | {name: value for name, value in asked.items() if value is not None}) + "\n")


def set_constants(arm: str) -> None:
    """What an arm trains with and asks with, its model before it too."""
    _, _, _, constants, prompt = ARMS[arm]
    for module, values in ((train_grpo, RECIPE | CONSTANTS | constants), (prompts, PROMPT | prompt)):
        for name, value in values.items():
            setattr(module, name, value)


def measure(model: str, data: dict[str, str], samples: int, folder: Path, cpu: list[str]) -> dict[str, dict]:
    """evaluate.py's figures for a model on each data set, unless they are there already; `folder` keeps them."""
    measured = {}
    for name, dataset in data.items():
        output, drawn = folder / name, samples if name == "test" else 0
        file = output / "eval.json"
        if not file.exists() or drawn and "samples" not in json.loads(file.read_text(encoding="utf-8")):
            print(f"\n===== {folder.name}: {name}", flush=True)
            where = ["--dataset", dataset, "--output", str(output)]
            evaluate.main([model, *where, "--samples", str(drawn), *cpu])
        measured[name] = json.loads(file.read_text(encoding="utf-8"))
    return measured


def train(model: str, dataset: str, folder: Path, steps: int, flags: list[str]) -> None:
    """One run of train_grpo.py: begun, continued, or left alone where it is finished."""
    done = folder / "results.json"
    if done.exists() and json.loads(done.read_text(encoding="utf-8")).get("finished"):
        return
    print(f"\n===== {folder.name}", flush=True)
    where = ["--model", model, "--dataset", dataset, "--output", str(folder), "--max-steps", str(steps)]
    train_grpo.main([*where, *flags, *["--resume"] * any(folder.glob("checkpoint-*"))])


def compare(before: Path, after: Path) -> str:
    """The questions that only the model after the training has right, those that only the one before it had, and how
    often chance alone would part them as far: a two-sided sign test on the greedy answers in two folders."""
    marks = []
    for folder in (before, after):
        lines = (folder / "test" / "eval.jsonl").read_text(encoding="utf-8").split("\n")
        marks.append([json.loads(line)["strict"] for line in lines if line])
    pairs = list(zip(*marks, strict=True))
    won, lost = pairs.count((False, True)), pairs.count((True, False))
    tail = sum(math.comb(won + lost, count) for count in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return f"{won}, {lost} (p = {min(2 * tail, 1):.2g})"


def row(name: str, measured: dict[str, dict], changed: str, results: dict) -> str:
    """A line of the table."""
    test, mgsm = measured["test"], measured.get("mgsm")
    cells = [name, with_interval(test, "strict"), f"{test['flexible']:.1%}", f"{test['format']:.1%}"]
    cells += [f"{test['mean_tokens']:.0f}", f"{test['truncated']:.1%}", changed]
    cells += [with_interval(test, name) if name in test else "" for name in ("mean", "pass")]
    cells.append(f"{with_interval(mgsm, 'strict')}, {mgsm['flexible']:.1%}" if mgsm else "")
    minutes, memory = results.get("train_seconds", 0) / 60, results.get("peak_memory_gb", 0)
    cells.append(f"{results['steps']} steps, {minutes:.0f} min, {memory:.1f} GB" if results else "")
    return f"| {' | '.join(cells)} |"


def with_interval(figures: dict, name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:.1%} ({low:.1%} to {high:.1%})"


def draw(folders: dict[str, Path], picture: Path) -> None:
    """What each arm was paid, how often it was right, and how long it thought."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    panels = {
        "correctness/correct": "right answers, of the sampled",
        "format/hard_format": "in the format, of the sampled",  # the tutorial's soft one wants one line a block
        "length/thinking": "characters of thinking",
    }
    for axes, (tag, title) in zip(drawing.subplots(1, 3), panels.items(), strict=True):
        for i, (name, folder) in enumerate(folders.items()):
            draw_curve(axes, read_history(folder), tag, f"C{i}", f"{ARMS[name][0]}: {ARMS[name][2]}")
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    picture.parent.mkdir(exist_ok=True)
    drawing.savefig(picture)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="arms of GRPO on a real model", allow_abbrev=False)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("dataset", help="hub id or folder")
    parser.add_argument("--cold", help="what train_sft.py made of the model; `cold` and `sifted` begin there")
    parser.add_argument("--traces", nargs="+", default=[], help="what make_traces.py wrote, for the `sifted` arms")
    parser.add_argument("--mgsm", help="data set folder with MGSM's questions as its test split, measured besides")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=RECIPE["MAX_STEPS"], help="of each arm")
    parser.add_argument("--questions", type=int, default=TEST_QUESTIONS, help="of the test split")
    parser.add_argument("--seed", type=int, default=train_grpo.SEED, help="of each arm")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="answers a question at temperature 1; 0: none")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "real")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--resume", action="store_true", help="it does in any case; a stopped run says it")
    flags = parser.parse_args(argv)
    for arm in flags.arms:
        for flag, what in NEEDS.get(arm, {}).items():
            if not getattr(flags, flag):
                raise UserError(f"the arm `{arm}` needs --{flag} FOLDER ({what}); or leave it out: --arms")
    sifted = [str(Path(folder, "sifted")) for folder in flags.traces]
    for folder in sifted:
        if not Path(folder, "train.jsonl").exists():
            raise UserError(f"--traces: no {folder!r}; name a folder where make_traces.py wrote `sifted`")

    cpu, output = ["--cpu"] * flags.cpu, flags.output
    asked = {name: getattr(flags, name) for name in ("model", "cold", "steps", "seed")}
    check_asked(output, asked | {"samples": flags.samples or None})
    data = {"test": write_questions([flags.dataset], output / "questions", flags.questions)}
    if flags.mgsm:
        data["mgsm"] = flags.mgsm
    watched = write_questions([flags.dataset], output / "watched", WATCHED)
    head = ["model", "strict", "flexible", "format", "tokens", "cut off", "won, lost"]
    head += ["one sample", f"any of {flags.samples}", "MGSM strict, flexible", "training"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for arm in flags.arms:
        set_constants(arm)
        name, before, change, _, _ = ARMS[arm]
        needs, questions = NEEDS.get(arm, {}), watched
        model = flags.cold if "cold" in needs else flags.model
        start = row(name, measure(model, data, flags.samples, output / before, cpu), "", {})
        if start not in lines:  # two arms may begin with the same model
            lines.append(start)
        if "traces" in needs:
            questions = write_questions(sifted, output / f"{arm}-questions", WATCHED)
        train(model, questions, output / arm, flags.steps, ["--seed", str(flags.seed), *cpu])
        results = json.loads((output / arm / "results.json").read_text(encoding="utf-8"))
        after = measure(str(output / arm), data, flags.samples, output / f"after-{arm}", cpu)
        lines.append(row(change, after, compare(output / before, output / f"after-{arm}"), results))
    table = "\n".join(lines)
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    draw({arm: output / arm for arm in flags.arms}, output / "rewards_real.png")
    print(f"\n{table}\n\nwritten: {output / 'table.md'}, {output / 'rewards_real.png'}")


if __name__ == "__main__":
    run(main)
