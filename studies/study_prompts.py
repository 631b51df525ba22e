"""What does a prompt do to a model that was not trained on it? Format, accuracy and length under several.

    python studies/study_prompts.py MODEL DATA               # eight prompts x 150 training questions, greedy
    python studies/study_prompts.py MODEL DATA --questions 8 --prompts ours tutorial    # a try

MODEL and DATA are what `train_grpo.py --model --dataset` takes. The questions are of the training split, always the
same, so that choosing a prompt by this table spends none of the test questions. Every prompt's answers are kept in
--output: stopped at any time, the same command goes on with the next prompt.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from real_model import RECIPE, TUTORIAL_PROMPT, check_asked, with_interval

import train_grpo
from engine.accuracy import answer, summarize
from engine.checkpoints import write_text
from engine.console import UserError, run
from engine.models import encode, load_model, pick_device
from engine.numbers import thinking_of
from engine.questions import load_questions, to_conversation
from make_traces import ask
from prompts import SYSTEM_PROMPT, WORKED_EXAMPLE

ROOT = Path(__file__).parent.parent

if TYPE_CHECKING:
    from datasets import Dataset

QUESTIONS = 150

ASKED = "小明有3盒铅笔，每盒12支，又买了5支，一共有多少支？"
SHORT = """\
<think>
3盒铅笔有3*12=36支，又买了5支，一共有36+5=41支。
</think>
<answer>
41
</answer>"""
# The same, thought through at the length at which the model thinks by itself.
LONG = """\
<think>
要算出一共有多少支铅笔，我们可以按照以下步骤进行：

1. 先看题目给出的条件：小明有3盒铅笔，每盒12支，之后又买了5支。

2. 计算3盒铅笔的数量：
\\[ 3 \\times 12 = 36 \\text{ 支} \\]

3. 又买的5支是单独的，不用再乘以盒数，所以把它加上去：
\\[ 36 + 5 = 41 \\text{ 支} \\]

4. 检查：36支加上5支是41支，问的是一共有多少支，所以不用再减去什么。

因此，小明一共有41支铅笔。
</think>
<answer>
41
</answer>"""


def behind(question: str, answer: str) -> list[dict]:
    """Our prompt, behind ASKED and an answer to it."""
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": answer}]
    return to_conversation(question, example=turns)


# name -> how the table calls it, and the messages for a question
PROMPTS = {
    "ours": ("ours (`SYSTEM_PROMPT`)", lambda question: to_conversation(question, example=[])),
    "tutorial": ("the tutorial's", lambda question: to_conversation(question, TUTORIAL_PROMPT, [])),
    "example": (
        "ours, a worked example below it",
        lambda question: to_conversation(question, f"{SYSTEM_PROMPT}\n\n例如，问题：{ASKED}\n{SHORT}", []),
    ),
    "behind": (
        "ours, behind the question",
        lambda question: [{"role": "user", "content": f"{question}\n\n{SYSTEM_PROMPT}"}],
    ),
    "turn": ("ours, a short example as a turn before", lambda question: behind(question, SHORT)),
    "long-turn": ("ours, a long example as a turn before", lambda question: behind(question, LONG)),
    "lines-turn": (
        "ours, an example in lines as a turn before (`WORKED_EXAMPLE`)",
        lambda question: to_conversation(question, example=WORKED_EXAMPLE),
    ),
    "free": ("no format: `make_traces.py --free`", lambda question: ask(question, {}, free=True)),
}


def draw_questions(flags: argparse.Namespace, seed: int) -> "Dataset":
    """The training questions that a study asks, always the same, and noted in its --output, which is for these only."""
    questions = load_questions(flags.dataset, "train")
    if not 1 <= flags.questions <= len(questions):
        raise UserError(f"--questions {flags.questions}: from 1 to the {len(questions)} of {flags.dataset!r}")
    check_asked(flags.output, {"model": flags.model, "dataset": flags.dataset, "questions": flags.questions})
    return questions.select(random.Random(seed).sample(range(len(questions)), flags.questions))


def write_lines(file: Path, rows: list[dict]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def row(name: str, answers: list[dict]) -> str:
    """A line of the table."""
    figures = summarize(answers)
    cells = [PROMPTS[name][0], with_interval(figures, "strict"), f"{figures['flexible']:.1%}"]
    cells += [f"{figures['format']:.1%}", f"{figures['mean_tokens']:.0f}", f"{figures['truncated']:.1%}"]
    thinking = sum(len(thinking_of(line["completion"])) for line in answers) / len(answers)
    prompt = sum(line["prompt_tokens"] for line in answers) / len(answers)
    return f"| {' | '.join([*cells, f'{thinking:.0f}', f'{prompt:.0f}'])} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="one model under several prompts", allow_abbrev=False)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("dataset", help="hub id or folder")
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of the training split")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "prompts")
    parser.add_argument("--cpu", action="store_true")
    flags = parser.parse_args(argv)

    chosen = draw_questions(flags, seed=0)
    sampler = tokenizer = None
    for name in flags.prompts:
        file = flags.output / f"{name}.jsonl"
        if file.exists():
            continue
        if sampler is None:
            from engine.rollout import make_sampler

            model, tokenizer = load_model(flags.model)
            device, autocast = pick_device(flags.cpu, train_grpo.BF16)
            sampler = make_sampler(model.to(device).eval(), tokenizer, autocast)
        pairs = [(PROMPTS[name][1](line["prompt"][-1]["content"]), line["answer"]) for line in chosen]
        limits = (RECIPE["MAX_COMPLETION_TOKENS"], train_grpo.EVAL_BATCH)
        answers = answer(sampler, tokenizer, pairs, *limits, temperature=0.0, title=name)
        lengths = map(len, encode(tokenizer, [prompt for prompt, _ in pairs]))
        lines = [line | {"prompt_tokens": length} for line, length in zip(answers, lengths, strict=True)]
        write_lines(file, lines)
        print(row(name, lines), flush=True)

    head = ["prompt", "strict (95 %)", "flexible", "format", "tokens", "cut off", "thinking", "prompt tokens"]
    table = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in flags.prompts:
        table.append(row(name, read_lines(flags.output / f"{name}.jsonl")))
    (flags.output / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n" + "\n".join(table) + f"\n\nwritten: {flags.output / 'table.md'}")


if __name__ == "__main__":
    run(main)
