"""A reward model beside the rules: which of the answers to an open question is better.

The last stage of DeepSeek-R1 (arXiv 2501.12948): the rules judge questions with a label, a reward model judges those
without, by the final answer alone, so that thinking stays free. A reward model's scores have no scale, and one model's
differ from another's, so what is paid is the rank within the group: nothing to calibrate, and no outlier to run after.
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
    """The reward function of REWARD_MODEL, for TRL, beside those of rewards.py.

    Args:
        device, dtype: where the reward model computes, and its weights' type (None: float32).

    Raises:
        UserError: no reward model there, or one that cannot read as much as a question and its answer.
    """
    model, tokenizer = load_reward_model(recipe.REWARD_MODEL, dtype)
    model.to(device).eval()
    limits = {name: getattr(recipe, name) for name in ("MAX_PROMPT_TOKENS", "MAX_COMPLETION_TOKENS")}
    check_positions(model, f"REWARD_MODEL {recipe.REWARD_MODEL!r}", **limits)

    def preference_reward(
        prompts: list[list[dict]], completions: list[list[dict]], answer: list[int | None], **kwargs
    ) -> list[float | None]:
        """The rank within its group, 0.0 to 1.0, of a completion whose question has no label; None for the others.

        One without a final answer ranks last, whatever the reward model makes of an empty text.
        """
        texts = [final_answer(completion[0]["content"]) for completion in completions]
        scored = [i for i, label in enumerate(answer) if label is None and texts[i]]
        scores = [None if label is not None else -math.inf for label in answer]
        asked = {i: (prompts[i][-1]["content"], texts[i]) for i in scored}
        pairs = list(dict.fromkeys(asked.values()))  # each once: equal answers earn the same, however they are padded
        dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        worth = dict(zip(pairs, score(model, tokenizer, dialogues, recipe.MICRO_BATCH), strict=True))
        for i in scored:
            scores[i] = worth[asked[i]]
        if scored and "log_metric" in kwargs:  # ranks average 0.5 always: the scores show whether anything is learned
            kwargs["log_metric"]("preference_score", fmean(scores[i] for i in scored))
        every, size = gather_object(scores), recipe.COMPLETIONS_PER_QUESTION  # a group may be split over two processes
        ranks = [rank for first in range(0, len(every), size) for rank in rank_group(every[first : first + size])]
        mine = PartialState().process_index * len(scores)
        return ranks[mine : mine + len(scores)]

    return preference_reward


def final_answer(completion: str) -> str:
    """What stands behind `</think>`, without the tags of the answer; empty where it never comes to that."""
    return completion.partition("</think>")[2].replace("<answer>", "").replace("</answer>", "").strip()


@torch.inference_mode()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list[list[dict]], batch_size: int
) -> list[float]:
    """The reward model's score of each dialogue, `batch_size` at a time, through its own chat template.

    Raises:
        UserError: a score that is not a number, which no rank can be made of.
    """
    scores: list[float] = []
    ids = encode(tokenizer, dialogues, complete=True) if dialogues else []
    for start in range(0, len(ids), batch_size):
        rows = tokenizer.pad({"input_ids": ids[start : start + batch_size]}, padding_side="right", return_tensors="pt")
        scores += model(**rows.to(model.device)).logits[:, 0].tolist()
    if any(map(math.isnan, scores)):
        raise UserError(f"REWARD_MODEL {model.name_or_path!r} gives scores that are no numbers; name another")
    return scores


def rank_group(scores: list[float | None]) -> list[float | None]:
    """Ranks from 0.0, the lowest, to 1.0; equal scores share the mean of their ranks. None stays None.

    A group has scores or has none, for it shares its question: None is no reward, and within a group it would count
    as one that earned nothing.
    """
    if None in scores:
        return scores
    below = [sum(other < mine for other in scores) for mine in scores]
    equal = [sum(other == mine for other in scores) - 1 for mine in scores]
    return [(low + same / 2) / (len(scores) - 1) for low, same in zip(below, equal, strict=True)]
