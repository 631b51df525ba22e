"""How many questions does a model answer correctly, and how sure is that?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from models import encode
from rewards import extract_answer, find_numbers, parse_number, soft_format_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from rollout import AnySampler


def interval(share: float, n: int) -> list[float]:
    """95 % interval of a share seen in n trials (Wilson 1927); within [0, 1] even at 0 and 1."""
    z = 1.959964
    center, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [(center + sign * spread) / (1 + z * z / n) for sign in (-1, 1)]


def grade(completion: str, label: int) -> dict:
    """strict: the one answer block holds the label. flexible: that number or, without one, the last in the text.
    format: it earns the soft format reward."""
    extracted = extract_answer(completion)
    number = None if extracted is None else parse_number(extracted)
    numbers = find_numbers(completion) if number is None else [number]
    [format_value] = soft_format_reward([[{"role": "assistant", "content": completion}]])
    return {
        "strict": number == label,
        "flexible": bool(numbers) and numbers[-1] == label,
        "format": format_value > 0,
    }


def evaluate(
    sampler: AnySampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    max_new_tokens: int,
    batch_size: int,
    title: str | None = None,
) -> tuple[dict, list[dict]]:
    """Answer every question greedily and grade the answers.

    Args:
        questions: the columns `prompt` and `answer` of `prompts.load_questions`.
        max_new_tokens: where an answer is cut off.
        batch_size: questions answered at a time.
        title: of the progress bar; None shows none.

    Returns:
        what `summarize` makes of them, and a row for every question, in their order:
        `{question, completion, label, strict, flexible, format, tokens, truncated}`.
    """
    from tqdm import tqdm

    prompts, labels = list(questions["prompt"]), list(questions["answer"])
    ids = encode(tokenizer, prompts)
    # alike lengths share a batch: less padding; the longest first, so that what the first batch allocates is enough
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    completion_ids: list[list[int]] = [[] for _ in ids]
    with tqdm(total=len(ids), desc=title, unit=" questions", disable=title is None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            made = sampler.generate([ids[i] for i in batch], max_new_tokens, on_finished=bar.update)
            for i, new in zip(batch, made, strict=True):
                completion_ids[i] = new
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    rows = [
        {"question": prompt[-1]["content"], "completion": text, "label": label, **grade(text, label)}
        | {"tokens": len(new), "truncated": not new or new[-1] not in sampler.eos}
        for prompt, text, label, new in zip(prompts, texts, labels, completion_ids, strict=True)
    ]
    return summarize(rows), rows


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


def describe(figures: dict) -> str:
    """One line for a person."""
    low, high = figures["strict_ci95"]
    return (
        f"strict {figures['strict']:.1%} (95 % interval {low:.1%} to {high:.1%}), flexible {figures['flexible']:.1%}, "
        f"format {figures['format']:.1%}, {figures['mean_tokens']:.0f} tokens, {figures['truncated']:.1%} cut off, "
        f"{figures['n']} questions"
    )
