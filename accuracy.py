"""How many questions does a model answer correctly, and how sure is that?"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

from models import encode
from prompts import to_conversation
from rewards import extract_answer, find_numbers, parse_number, soft_format_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from rollout import PlainSampler, Sampler


def answer(
    sampler: Sampler | PlainSampler, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int
) -> str:
    """The model's greedy answer to one question, as text."""
    ids = sampler.generate(encode(tokenizer, [to_conversation(question)]), max_new_tokens)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def wilson_interval(share: float, n: int) -> list[float]:
    """95 % interval of a share seen in n trials (Wilson 1927); within [0, 1] even at 0 and 1."""
    z = 1.959964
    center, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [(center + sign * spread) / (1 + z * z / n) for sign in (-1, 1)]


def grade(completion: str, label: int) -> dict:
    """strict: the one answer block holds the label. flexible: that number or, without one, the last in the text."""
    extracted = extract_answer(completion)
    number = None if extracted is None else parse_number(extracted)
    numbers = find_numbers(completion) if number is None else [number]
    return {"strict": number == label, "flexible": bool(numbers) and numbers[-1] == label}


def evaluate(
    sampler: Sampler | PlainSampler,
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
        the figures `{n, strict, flexible, format, mean_tokens, truncated, strict_ci95}` (shares, and tokens),
        and a row `{question, completion, label, strict, flexible}` for every question, in their order.
    """
    from tqdm import tqdm

    prompts, labels = list(questions["prompt"]), list(questions["answer"])
    ids = encode(tokenizer, prompts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths share a batch: less padding
    completion_ids: list[list[int]] = [[] for _ in ids]
    with tqdm(total=len(ids), desc=title, unit=" questions", disable=title is None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, new in zip(batch, sampler.generate([ids[i] for i in batch], max_new_tokens), strict=True):
                completion_ids[i] = new
            bar.update(len(batch))
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    rows = [
        {"question": prompt[-1]["content"], "completion": text, "label": label, **grade(text, label)}
        for prompt, text, label in zip(prompts, texts, labels, strict=True)
    ]
    n = len(rows)
    formats = soft_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    strict = sum(row["strict"] for row in rows) / n
    ended = sum(bool(new) and new[-1] in sampler.eos for new in completion_ids)
    figures = {
        "n": n,
        "strict": strict,
        "flexible": sum(row["flexible"] for row in rows) / n,
        "format": sum(value > 0 for value in formats) / n,
        "mean_tokens": sum(map(len, completion_ids)) / n,
        "truncated": 1 - ended / n,
        "strict_ci95": wilson_interval(strict, n),
    }
    return figures, rows


def describe(figures: dict) -> str:
    """One line for a person."""
    low, high = figures["strict_ci95"]
    return (
        f"strict {figures['strict']:.1%} (95 % interval {low:.1%} to {high:.1%}), flexible {figures['flexible']:.1%}, "
        f"format {figures['format']:.1%}, {figures['mean_tokens']:.0f} tokens, {figures['truncated']:.1%} cut off, "
        f"{figures['n']} questions"
    )


def report(
    sampler: Sampler | PlainSampler,
    tokenizer: PreTrainedTokenizerBase,
    test: Dataset,
    recipe: SimpleNamespace,
    title: str,
) -> tuple[dict, str]:
    """Evaluate on all of `test` and print a line; returns the figures, and the answer to the probe."""
    figures, _ = evaluate(sampler, tokenizer, test, recipe.MAX_COMPLETION_TOKENS, recipe.EVAL_BATCH, title)
    print(f"{title:<11}{describe(figures)}", flush=True)
    return figures, answer(sampler, tokenizer, recipe.PROBE_QUESTION, recipe.MAX_COMPLETION_TOKENS)
