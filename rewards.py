"""The rewards that GRPO (arXiv 2402.03300) trains on: five, and a sixth for the language. By default one is paid.

They are rules, as in DeepSeek-R1 (arXiv 2501.12948, section 2.2.2): no model judges an answer.
Where this differs from most copies of these rewards:
  1. Reasoning may run over any number of lines. Where only one line earns the format, the model stops reasoning.
  2. A number counts only inside the one answer block; a bare 72 without tags is worth nothing.
  3. The answer is compared by value: 72个, 72.0 and, for 1080, 1,080 are right.
  4. Only the right answer is paid; the others are watched (REWARD_WEIGHTS).

Model output is untrusted: no text raises, and the work is linear in its length. A bad label does raise.

A question may have no label (preference.py judges its answers, not by rules). Then the two rewards about its number are
None, which TRL leaves out: all completions of a group share their question, so within a group it changes nothing. The
others apply to every row.
"""

from engine.numbers import (
    TAGS,
    answered_number,
    chinese_share,
    extract_answer,
    find_numbers,
    is_hard_format,
    is_label,
    is_soft_format,
    parse_number,
    thinking_of,
)

__all__ = ["extract_answer", "find_numbers", "parse_number"]  # others import these from here too


def _texts(completions: list[list[dict]]) -> list[str]:
    return [completion[0]["content"] for completion in completions]


# --- The rewards ---
# completions: one [{"role": "assistant", "content": str}] per completion; the result is one float for each, in order.
# kwargs are the data set's other columns and what else the trainer passes.


def mark_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    """0.125 for each of the four tags that occurs exactly once, 0.5 in all: the first step towards the format."""
    return [0.125 * sum(text.count(tag) == 1 for tag in TAGS) for text in _texts(completions)]


def soft_format_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    """0.5 for one think block, white space and one answer block, neither empty, and nothing around them.

    DeepSeek-R1's format reward (arXiv 2501.12948).
    """
    return [0.5 if is_soft_format(text) else 0.0 for text in _texts(completions)]


def hard_format_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    """0.5 for the soft format with each tag alone on its line, without blanks, and one newline between the blocks."""
    return [0.5 if is_hard_format(text) else 0.0 for text in _texts(completions)]


def digit_reward(completions: list[list[dict]], **kwargs) -> list[float | None]:
    """0.5 where the answer block holds exactly one number, right or wrong; None for a question without a label."""
    pairs = zip(_texts(completions), kwargs.get("answer", [0] * len(completions)), strict=True)
    return [None if label is None else 0.0 if answered_number(text) is None else 0.5 for text, label in pairs]


def correctness_reward(completions: list[list[dict]], answer: list[int | None], **kwargs) -> list[float | None]:
    """2.0 where the answer block holds one number that equals the label, else 0.0; None for a question without a label.

    DeepSeek-R1's accuracy reward (arXiv 2501.12948).

    Raises:
        ValueError: a label that is not an integral number, or not one label per completion. A wrong label would
            only ever look like a wrong answer, so it must not pass in silence.
    """
    if len(answer) != len(completions):
        raise ValueError(f"{len(answer)} labels for {len(completions)} completions")
    for index, label in enumerate(answer):
        if label is not None and not is_label(label):
            raise ValueError(f"label {index} is {label!r}, not an integer")
    if "log_extra" in kwargs:  # TRL keeps it beside the completions, where the monitor finds it
        kwargs["log_extra"]("label", answer)
    pairs = zip(_texts(completions), answer, strict=True)
    return [None if label is None else 2.0 if answered_number(text) == int(label) else 0.0 for text, label in pairs]


def language_reward(completions: list[list[dict]], prompts: list[list[dict]], **kwargs) -> list[float]:
    """The share of Chinese in the thinking, 0.0 to 1.0; words of the question and formulas are left out.

    DeepSeek-R1's language consistency reward (arXiv 2501.12948, eq. 7). In the paper it cost a little accuracy.
    """
    pairs = zip(_texts(completions), prompts, strict=True)
    return [chinese_share(thinking_of(text), prompt[-1]["content"]) for text, prompt in pairs]


REWARDS = [mark_reward, soft_format_reward, hard_format_reward, digit_reward, correctness_reward, language_reward]
REWARD_MAXIMA = [0.5, 0.5, 0.5, 0.5, 2.0, 1.0]  # the most that each can give


def weights_fit(weights: list[float]) -> bool:
    """Whether there is a weight for each reward, none is negative, and the language can earn at most a tenth of all."""
    if not len(weights) == len(REWARDS) == len(REWARD_MAXIMA) or min(weights) < 0:
        return False
    earned = [weight * most for weight, most in zip(weights, REWARD_MAXIMA, strict=True)]
    return earned[-1] <= sum(earned) / 10


# Only right answers are paid. When the format was paid too (1, 1, 1, 1, 3, 0), the greedy answers of a real model stood
# still or became worse: a wrong answer in perfect format earned more than a long one that did not finish
# (docs/results.md). The other rewards are still shown in TensorBoard. A model that hardly ever keeps to the format has
# a cold start first (train_r1.py). The language can get a weight too, at most a tenth of all there is to earn: a single
# Chinese word already has the full share. A reward of your own goes before the language, in all three lists.
REWARD_WEIGHTS = [
    0.0,  # mark
    0.0,  # soft format
    0.0,  # hard format
    0.0,  # digit
    1.0,  # correctness
    0.0,  # language
]
