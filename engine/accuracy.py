"""How many questions does a model answer correctly, and how sure is that?"""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from engine.numbers import answered_number, find_numbers
from engine.templates import encode
from rewards import soft_format_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from engine.rollout import Sampler


Z = 1.959964  # standard errors on each side of a 95 % interval


def interval(share: float, n: int) -> list[float]:
    """95 % interval of a share seen in n trials (Wilson 1927); within [0, 1] even at 0 and 1."""
    center, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return [(center + sign * spread) / (1 + Z * Z / n) for sign in (-1, 1)]


def grade(completion: str, label: int) -> dict:
    """strict: the one answer block holds the label. flexible: that number or, without one, the last in the text.
    format: it earns the soft format reward."""
    number = answered_number(completion)
    numbers = find_numbers(completion) if number is None else [number]
    [format_value] = soft_format_reward([[{"role": "assistant", "content": completion}]])
    return {
        "strict": number == label,
        "flexible": bool(numbers) and numbers[-1] == label,
        "format": format_value > 0,
    }


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    max_new_tokens: int,
    batch_size: int,
    title: str | None = None,
) -> tuple[dict, list[dict]]:
    """Answer every question greedily and grade the answers.

    Args:
        questions: the columns `prompt` and `answer` of `questions.load_questions`.
        max_new_tokens: where an answer is cut off.
        batch_size: questions answered at a time.
        title: of the progress bar; None shows none.

    Returns:
        what `summarize` makes of them, and a row for every question, in their order:
        `{question, completion, label, strict, flexible, format, tokens, truncated}`.
    """
    pairs = list(zip(questions["prompt"], questions["answer"], strict=True))
    rows = answer(sampler, tokenizer, pairs, max_new_tokens, batch_size, 0.0, title)
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
    """Answer every question several times at temperature 1, as in training: there the gain of RL shows first.

    Args:
        samples: answers to each question; the others as in `evaluate`.

    Returns:
        what `summarize_samples` makes of them, and for every question the rows of its answers, as in `evaluate`.
    """
    pairs = zip(questions["prompt"], questions["answer"], strict=True)
    pairs = [pair for pair in pairs for _ in range(samples)]
    rows = answer(sampler, tokenizer, pairs, max_new_tokens, batch_size, 1.0, title)
    drawn = [rows[start : start + samples] for start in range(0, len(rows), samples)]
    return summarize_samples(drawn), drawn


def answer(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[list[dict], int]],
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    title: str | None,
) -> list[dict]:
    """The row of each pair of prompt and label, in their order."""
    from tqdm import tqdm

    ids = encode(tokenizer, [prompt for prompt, _ in pairs])
    # alike lengths share a batch: less padding; the longest first, so that what the first batch allocates is enough
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    completion_ids: list[list[int]] = [[] for _ in ids]
    with tqdm(
        total=len(ids),
        desc=title,
        unit=" answers",
        mininterval=5,  # seconds; a log file is not flooded
        disable=title is None,
        leave=False,
    ) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            made = sampler.generate([ids[i] for i in batch], max_new_tokens, temperature)
            bar.update(len(batch))
            for i, new in zip(batch, made, strict=True):
                completion_ids[i] = new
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [
        {"question": prompt[-1]["content"], "completion": text, "label": label, **grade(text, label)}
        | {"tokens": len(new), "truncated": not new or new[-1] not in sampler.eos}
        for (prompt, label), text, new in zip(pairs, texts, completion_ids, strict=True)
    ]


def summarize(rows: list[dict]) -> dict:
    """The figures `{n, strict, flexible, format, mean_tokens, truncated, strict_ci95}`: shares, and tokens."""
    n = len(rows)
    share = {name: sum(row[name] for row in rows) / n for name in ("strict", "flexible", "format", "truncated")}
    return {
        "n": n,
        "strict": share["strict"],
        "flexible": share["flexible"],
        "format": share["format"],
        "mean_tokens": sum(row["tokens"] for row in rows) / n,
        "truncated": share["truncated"],
        "strict_ci95": interval(share["strict"], n),
    }


def summarize_samples(drawn: list[list[dict]]) -> dict:
    """The figures `{samples, mean, pass, mean_ci95, pass_ci95}` of several answers a question, by their `strict`.

    mean: the accuracy of one answer; its interval is over questions, since the answers to one are alike.
    pass: the share of questions with at least one right answer.
    """
    n = len(drawn)
    shares = [fmean(answer["strict"] for answer in answers) for answers in drawn]
    mean, passed = fmean(shares), sum(share > 0 for share in shares) / n
    if 0 < mean < 1:
        spread = Z * stdev(shares) / math.sqrt(n) if n > 1 else 1.0
        mean_interval = [max(mean - spread, 0.0), min(mean + spread, 1.0)]
    else:  # no spread was seen, which is not none
        mean_interval = interval(mean, n)
    return {
        "samples": len(drawn[0]),
        "mean": mean,
        "pass": passed,
        "mean_ci95": mean_interval,
        "pass_ci95": interval(passed, n),
    }


def sign_test(won: int, lost: int) -> float:
    """How often chance alone would part two equal models as far, by the questions that only one of them has right.

    Two-sided; 1.0 where none is.
    """
    tail = sum(math.comb(won + lost, count) for count in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return min(2 * tail, 1.0)


def describe(figures: dict) -> str:
    """One line for a person."""
    low, high = figures["strict_ci95"]
    return (
        f"strict {figures['strict']:.1%} (95 % interval {low:.1%} to {high:.1%}), flexible {figures['flexible']:.1%}, "
        f"format {figures['format']:.1%}, {figures['mean_tokens']:.0f} tokens, {figures['truncated']:.1%} cut off, "
        f"{figures['n']} questions"
    )


def describe_samples(figures: dict) -> str:
    """One line for a person."""
    (low, high), (low_any, high_any) = figures["mean_ci95"], figures["pass_ci95"]
    return (
        f"one answer at temperature 1 {figures['mean']:.1%} ({low:.1%} to {high:.1%}), "
        f"any of {figures['samples']} {figures['pass']:.1%} ({low_any:.1%} to {high_any:.1%})"
    )
