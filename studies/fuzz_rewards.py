"""Does any text break a reward? Random completions, and mutations of real ones, held against what must always be true.

    python studies/fuzz_rewards.py                                    # a million, built of pieces: a minute
    python studies/fuzz_rewards.py --texts output/eval.jsonl          # a million mutations of a model's completions
    python studies/fuzz_rewards.py --count 20000 --seed 1             # a short look at others

--texts takes what evaluate.py, make_traces.py or a run wrote: eval.jsonl, questions.jsonl, samples.jsonl.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.console import UserError, run
from engine.numbers import extract_answer, find_numbers, parse_number
from rewards import correctness_reward, digit_reward, hard_format_reward, mark_reward, soft_format_reward

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = [
    *TAGS, *TAGS, *(f"{tag}\n" for tag in TAGS), "<", ">", "</", "<answer", "think>", "<ANSWER>", "<answer/>",
    *"0123456789", "1,080", "1，080", "1,08", "３００", "12", "72", ".5", "3.50", "42.", "5²", "1½", "①", "٣", "1e3",
    "3/4", "0" * 40, *"+-−－–—*$￥%％.,，。：=×÷()（）{}[]\\/", "负", "负 ", "**", "\\boxed{", "\\text{", "\\(", "\\[",
    "$$", *"百千万亿", "千克", "百分", "万元", "个", "分钟", "cm²", "美元", "第", "或",
    *"√π!^|~半天十的", "\\sqrt{", "\\pi", "分之", "又一", "m2", "cm^2", "的平方", "sin ",
    "我们一步一步来", "因此", "答案是", "步骤", "Jasper", "the answer is ", "```python\n", "\n", "\n\n", "\r\n", "\t",
    " ", "　", "\u200b", "\0", "\ud800", "\U0001f600", "é", "ﬁ", "\u202e",
]  # fmt: skip
VALUES = {  # what each may be worth
    mark_reward: {0.0, 0.125, 0.25, 0.375, 0.5},
    soft_format_reward: {0.0, 0.5},
    hard_format_reward: {0.0, 0.5},
    digit_reward: {0.0, 0.5},
    correctness_reward: {0.0, 2.0},
}


def read_texts(file: str) -> list[str]:
    """The completions in a file of lines. Raises UserError where there are none."""
    try:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"--texts {file!r} cannot be read: {error}") from error
    texts = [row["completion"] for row in rows if isinstance(row.get("completion"), str)]
    texts += [sample.get("text", sample.get("completion")) for row in rows for sample in row.get("samples", [])]
    if not texts:
        raise UserError(f"--texts {file!r} holds no completions; name an eval.jsonl, questions.jsonl or samples.jsonl")
    return texts


def build(rng: random.Random) -> str:
    """A completion out of pieces, every other one inside of the format, where the small differences lie."""
    inside, behind = ("".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(2))
    if rng.random() < 0.5:
        return inside + behind
    end = rng.choice(["", "", "", rng.choice(PIECES)])
    return f"<think>\n{inside}\n</think>\n<answer>\n{behind[:6]}\n</answer>{end}"


def mutate(text: str, texts: list[str], rng: random.Random) -> str:
    """A few random edits: a span is cut, doubled, moved or spliced in from another text, or a piece is put in."""
    for _ in range(rng.randint(1, 4)):
        start, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        span, other = text[start:end], rng.choice(texts)
        before, after = text[:start], text[end:]
        piece = before + rng.choice(PIECES) + text[start:]
        edits = [
            before + after,  # cut
            before + span,  # cut off
            before + span + span + after,
            span + before + after,
            before + other[len(other) // 2 :],
            f"<think>\n{text}\n</think>\n<answer>\n{span[:6]}\n</answer>",
        ]
        text = rng.choice([*edits, piece, piece, piece])
    return text[:20_000]  # doubled again and again


def earn(text: str, label: int) -> dict[Callable, float]:
    """What each reward gives to this completion."""
    completion = [[{"role": "assistant", "content": text}]]
    return {reward: reward(completion, answer=[label])[0] for reward in VALUES}


def find_fault(text: str, label: int, worth: dict[Callable, float]) -> str | None:
    """What is wrong with the rewards of this completion; None where nothing is."""
    for reward, values in VALUES.items():
        if worth[reward] not in values:
            return f"{reward.__name__} is {worth[reward]}"
    block = extract_answer(text)
    number = None if block is None else parse_number(block)
    once = [text.count(tag) == 1 for tag in TAGS]
    must = {
        "mark: 0.125 for each tag that occurs once": worth[mark_reward] == 0.125 * sum(once),
        "soft only with all four tags": not worth[soft_format_reward] or all(once),
        "soft wherever hard": not worth[hard_format_reward] or worth[soft_format_reward] > 0,
        "an answer only from one block": (block is None) or all(once[2:]),
        "digit where the block is a number": (worth[digit_reward] > 0) == (number is not None),
        "correct where that number is the label": (worth[correctness_reward] > 0) == (number == label),
        "the one number is the one found": number is None or find_numbers(block) == [number],
        "no text around the block changes the answer": block is None
        or extract_answer(f"<answer>{block}</answer>") == block,
        "white space around the whole changes no format": worth[soft_format_reward]
        == soft_format_reward([[{"role": "assistant", "content": f" \n{text}\n"}]])[0],
    }
    return next((name for name, holds in must.items() if not holds), None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="look for texts that break a reward", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=1_000_000, help="completions (default: a million)")
    parser.add_argument("--texts", help="a file of a model's completions, which are mutated")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    texts = read_texts(flags.texts) if flags.texts else []
    rng, earned, characters, slowest = random.Random(flags.seed), Counter(), 0, 0.0
    start = time.process_time()
    for _ in range(flags.count):
        text = mutate(rng.choice(texts), texts, rng) if texts else build(rng)
        block = extract_answer(text)
        number = None if block is None else parse_number(block)
        label = rng.randint(-9, 99)
        if number is not None and number == int(number) and rng.random() < 0.5:
            label = int(number)
        begun = time.process_time()
        try:
            worth = earn(text, label)
            fault = find_fault(text, label, worth)
        except Exception as error:  # any is a find
            fault = f"{type(error).__name__}: {error}"
        slowest = max(slowest, (time.process_time() - begun) / max(len(text), 1000) * 1e6)
        if fault:
            raise UserError(f"{fault}; label {label}, completion {text!r}")
        characters += len(text)
        earned.update(reward.__name__ for reward in VALUES if worth[reward])
    seconds = time.process_time() - start
    what = f"mutations of {len(texts)} completions of {flags.texts}" if texts else "built of pieces"
    print(f"completions   {flags.count}, {what}, seed {flags.seed}")
    print(f"characters    {characters / flags.count:.0f} each")
    print(
        "earned        "
        + ", ".join(f"{earned[reward.__name__] / flags.count:.1%} {reward.__name__}" for reward in VALUES)
    )
    print(f"time          {seconds:.0f} s in all; the slowest text {slowest:.2f} microseconds a character")
    print("faults        none")


if __name__ == "__main__":
    run(main)
