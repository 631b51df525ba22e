"""A reward model beside the rules: it says which answer to a question without a label is better.

This is the last stage of DeepSeek-R1 (arXiv 2501.12948). The reward model reads only the final answer, so the thinking
stays free. Its scores have no fixed scale, so the reward is the rank within the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from engine.console import UserError
from engine.models import check_positions, load_reward_model
from engine.templates import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_preference(recipe: SimpleNamespace, device: torch.device, dtype: torch.dtype | None) -> Callable:
    """Load REWARD_MODEL, with weights in `dtype` (None: float32); returns a reward function like those of rewards.py.

    Raises UserError if it is no reward model, or if it cannot read texts as long as a question and its answer.
    """
    model, tokenizer = load_reward_model(recipe.REWARD_MODEL, dtype)
    model.to(device).eval()
    limits = {name: getattr(recipe, name) for name in ("MAX_PROMPT_TOKENS", "MAX_COMPLETION_TOKENS")}
    check_positions(model, f"REWARD_MODEL {recipe.REWARD_MODEL!r}", **limits)

    def preference_reward(
        prompts: list[list[dict]], completions: list[list[dict]], answer: list[int | None], **kwargs
    ) -> list[float | None]:
        """The rank within its group, 0.0 to 1.0, of a completion whose question has no label; None for the others.

        A completion without a final answer ranks last.
        """
        asked = {}  # index of a completion -> question and final answer
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = final_answer(completion[0]["content"])
            if answer[i] is None and text:
                asked[i] = prompt[-1]["content"], text
        pairs = list(dict.fromkeys(asked.values()))  # without repetitions: equal answers get equal scores
        dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        score_of = dict(zip(pairs, score(model, tokenizer, dialogues, recipe.MICRO_BATCH), strict=True))
        scores = [None if label is not None else -math.inf for label in answer]
        for i, pair in asked.items():
            scores[i] = score_of[pair]
        if asked and "log_metric" in kwargs:  # the mean of ranks is always 0.5; the scores show what is learned
            kwargs["log_metric"]("preference_score", fmean(scores[i] for i in asked))
        gathered, size = gather_object(scores), recipe.COMPLETIONS_PER_QUESTION  # two processes may share a group
        ranks = [rank for start in range(0, len(gathered), size) for rank in rank_group(gathered[start : start + size])]
        first = PartialState().process_index * len(scores)
        return ranks[first : first + len(scores)]

    return preference_reward


def final_answer(completion: str) -> str:
    """The text behind `</think>`, without the tags of the answer; empty if there is none."""
    return completion.partition("</think>")[2].replace("<answer>", "").replace("</answer>", "").strip()


@torch.inference_mode()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list[list[dict]], batch_size: int
) -> list[float]:
    """The reward model's score of each dialogue, `batch_size` at a time. Raises UserError if a score is NaN."""
    scores: list[float] = []
    ids = encode(tokenizer, dialogues, complete=True) if dialogues else []
    for start in range(0, len(ids), batch_size):
        rows = tokenizer.pad({"input_ids": ids[start : start + batch_size]}, padding_side="right", return_tensors="pt")
        scores += model(**rows.to(model.device)).logits[:, 0].tolist()
    if any(map(math.isnan, scores)):
        raise UserError(f"REWARD_MODEL {model.name_or_path!r} gives scores that are no numbers; name another")
    return scores


def rank_group(scores: list[float | None]) -> list[float | None]:
    """Ranks from 0.0 for the lowest score to 1.0; equal scores share the mean of their ranks."""
    if None in scores:  # the question has a label, so this whole group has no scores
        return scores
    below = [sum(other < mine for other in scores) for mine in scores]
    equal = [sum(other == mine for other in scores) - 1 for mine in scores]
    return [(low + same / 2) / (len(scores) - 1) for low, same in zip(below, equal, strict=True)]
