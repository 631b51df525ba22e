"""How many questions a model answers correctly, and the 95 % interval of that share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from tqdm import tqdm

from engine.numbers import answered_number, find_numbers
from engine.templates import encode
from rewards import soft_format_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from engine.rollout import Sampler


Z = 1.959964  # standard errors on each side of a 95 % interval


def interval(share: float, n: int) -> list[float]:
    """The 95 % interval of a share seen in n trials (Wilson 1927); it stays within [0, 1]."""
    center, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return [(center + sign * spread) / (1 + Z * Z / n) for sign in (-1, 1)]


def grade(completion: str, label: int) -> dict:
    """What is right about a completion.

    strict: its one answer block holds the label. flexible: the same, but without a number there the last number of the
    text counts. format: it earns the soft format reward.
    """
    number = answered_number(completion)
    numbers = find_numbers(completion) if number is None else [number]
    [reward] = soft_format_reward([[{"role": "assistant", "content": completion}]])
    return {"strict": number == label, "flexible": numbers[-1:] == [label], "format": reward > 0}


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset | dict[str, list],
    max_new_tokens: int,
    batch_size: int,
    title: str | None = None,
    temperature: float = 0.0,
) -> tuple[dict, list[dict]]:
    """Answer every question and grade the answers.

    Args:
        questions: the columns `prompt` and `answer` of `questions.load_questions`.
        max_new_tokens: where an answer is cut off.
        batch_size: questions answered at a time.
        title: of the progress bar; None shows none.
        temperature: of the sampling; 0 is greedy.

    Returns:
        The figures of `summarize`, and one row per question, in their order:
        `{question, completion, label, strict, flexible, format, tokens, truncated}`.
    """
    prompts, labels = questions["prompt"][:], questions["answer"][:]
    ids = encode(tokenizer, prompts)
    # Prompts of like length share a batch, which needs less padding. The longest come first: memory peaks at once.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    completion_ids: list[list[int]] = [[] for _ in ids]
    with tqdm(total=len(ids), desc=title, unit=" answers", mininterval=5, disable=title is None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]

            def show(finished: int, before: int = start) -> None:  # a batch can take minutes on a CPU
                bar.update(before + finished - bar.n)

            made = sampler.generate([ids[i] for i in batch], max_new_tokens, temperature, show)
            show(len(batch))
            for i, new in zip(batch, made, strict=True):
                completion_ids[i] = new
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    rows = [
        {"question": prompt[-1]["content"], "completion": text, "label": label, **grade(text, label)}
        | {"tokens": len(new), "truncated": not new or new[-1] not in sampler.eos}
        for prompt, label, text, new in zip(prompts, labels, texts, completion_ids, strict=True)
    ]
    return summarize(rows), rows


def evaluate_samples(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    max_new_tokens: int,
    batch_size: int,
    samples: int,
    title: str | None = None,
) -> tuple[dict, list[list[dict]]]:
    """As `evaluate`, but draw `samples` answers per question at temperature 1, as in training.

    The gain of RL shows there first. Returns the figures of `summarize_samples`, and for each question the rows of its
    answers.
    """
    repeated = {name: [value for value in questions[name] for _ in range(samples)] for name in ("prompt", "answer")}
    _, rows = evaluate(sampler, tokenizer, repeated, max_new_tokens, batch_size, title, temperature=1.0)
    drawn = [rows[start : start + samples] for start in range(0, len(rows), samples)]
    return summarize_samples(drawn), drawn


def summarize(rows: list[dict]) -> dict:
    """The figures `{n, strict, flexible, format, mean_tokens, truncated, strict_ci95}`: shares, and tokens."""
    n = len(rows)

    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / n

    return {
        "n": n,
        "strict": mean("strict"),
        "flexible": mean("flexible"),
        "format": mean("format"),
        "mean_tokens": mean("tokens"),
        "truncated": mean("truncated"),
        "strict_ci95": interval(mean("strict"), n),
    }


def pass_rate(answers: list[dict]) -> float:
    """The share of right answers among those drawn to one question."""
    return fmean(answer["strict"] for answer in answers)


def spread_of_mean(shares: list[float]) -> float:
    """Half the 95 % interval of the mean of the questions' shares; 1.0 where there is one question."""
    return Z * stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 1.0


def summarize_samples(drawn: list[list[dict]]) -> dict:
    """The figures `{samples, mean, pass, mean_ci95, pass_ci95}` of the strict answers to each question.

    mean is pass@1, the accuracy of one sampled answer. Its interval is over questions, since the answers to one
    question are alike. pass is pass@k, the share of questions with at least one right answer among their k.
    """
    n = len(drawn)
    shares = [pass_rate(answers) for answers in drawn]
    mean, passed = fmean(shares), sum(share > 0 for share in shares) / n
    if 0 < mean < 1:
        spread = spread_of_mean(shares)
        mean_interval = [max(mean - spread, 0.0), min(mean + spread, 1.0)]
    else:  # that all shares are the same does not make the mean certain
        mean_interval = interval(mean, n)
    return {
        "samples": len(drawn[0]),
        "mean": mean,
        "pass": passed,
        "mean_ci95": mean_interval,
        "pass_ci95": interval(passed, n),
    }


def needs_cold_start(figures: dict) -> bool:
    """Whether the model can do more than twice as much as it can put into the format: strict against flexible."""
    return figures["strict"] < figures["flexible"] / 2


def sign_test(won: int, lost: int) -> float:
    """How often chance alone would part two equal models as far, by the questions that only one of them has right.

    Two-sided; 1.0 where none is.
    """
    tail = sum(math.comb(won + lost, count) for count in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return min(2 * tail, 1.0)


def compare(rows: list[dict], others: list[dict]) -> str:
    """How many questions only one of two models has right, in words; `others` are the other one's rows, in order."""
    pairs = [(row["strict"], other["strict"]) for row, other in zip(rows, others, strict=True)]
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    return f"{won} won, {lost} lost (sign test: p = {sign_test(won, lost):.2g})"


def compare_samples(rows: list[dict], others: list[dict]) -> str:
    """How much pass@1 differs between two models, in words; the interval is over questions, as in summarize_samples.

    `others` are the other one's rows, in order. The rows of both hold the sampled answers.
    """
    pairs = zip(rows, others, strict=True)
    differences = [pass_rate(row["samples"]) - pass_rate(other["samples"]) for row, other in pairs]
    mean, spread = 100 * fmean(differences), 100 * spread_of_mean(differences)
    return f"pass@1 {mean:+.1f} points ({mean - spread:+.1f} to {mean + spread:+.1f})"


def read_answers(folder: Path) -> list[dict]:
    """The rows of eval.jsonl that an evaluation has written into a folder."""
    lines = (folder / "eval.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def describe(figures: dict) -> str:
    """The figures of `summarize` in one line."""
    low, high = figures["strict_ci95"]
    return (
        f"strict {figures['strict']:.1%} (95 % interval {low:.1%} to {high:.1%}), flexible {figures['flexible']:.1%}, "
        f"format {figures['format']:.1%}, {figures['mean_tokens']:.0f} tokens, {figures['truncated']:.1%} cut off, "
        f"{figures['n']} questions"
    )


def describe_samples(figures: dict) -> str:
    """The figures of `summarize_samples` in one line."""
    (low, high), (low_any, high_any) = figures["mean_ci95"], figures["pass_ci95"]
    return (
        f"pass@1 {figures['mean']:.1%} ({low:.1%} to {high:.1%}), "
        f"pass@{figures['samples']} {figures['pass']:.1%} ({low_any:.1%} to {high_any:.1%})"
    )
