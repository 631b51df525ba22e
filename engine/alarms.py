"""Alarms: what looks wrong in the history of a training run, and what to do about it."""

import math
from collections.abc import Collection
from statistics import fmean

History = list[dict[str, float]]  # one row per step: {"step": 12, "reward/total": 5.1, "heldout/strict": 0.4, ...}

WINDOW = 20  # steps; most alarms judge means over so many steps, because single steps are noisy
REPEAT = 100  # steps until an alarm that still holds is raised again
# An alarm is raised where ...
FORMAT_RISE = 0.05  # the share of completions that earn the format rewards has risen by this much, while ...
CORRECT_FALL = 0.3  # ... this share of the right answers was lost
CUT_OFF = 0.2  # a larger share of the completions reaches MAX_COMPLETION_TOKENS
REPEATING = 0.1  # a larger share of the completions ends in a repetition
ZERO_VARIANCE = 0.8  # in a larger share of the groups all completions earn the same
SHORTER_THINKING = 0.5  # the thinking is shorter than this share of its first length: the mean of the last ...
LAST_STEPS = 5  # ... so many steps against the mean of the ...
FIRST_STEPS = 2  # ... first steps; these are few, because a model can begin to guess within five
LOWER_ENTROPY = 0.1  # the entropy is below this share of its first value


def rolling(history: History, tag: str) -> list[float]:
    """The means of `tag` over every WINDOW consecutive steps; empty before there are so many steps."""
    values = [row[tag] for row in history if tag in row]
    return [fmean(values[end - WINDOW : end]) for end in range(WINDOW, len(values) + 1)]


def newest(history: History, tag: str) -> float:
    """The mean of `tag` over the last WINDOW steps; 0.0 before there are so many steps."""
    return (rolling(history, tag) or [0.0])[-1]


def find_alarms(history: History) -> dict[str, str]:
    """What looks wrong at the newest step: the name of each alarm, and the line to show for it."""
    found = {}

    # What ruined the tutorial's runs: the format has improved since the best steps, but the answers have become worse.
    labelled = [row for row in history if "correctness/correct" in row]  # a step may have no question with a label
    correct, form = rolling(labelled, "correctness/correct"), rolling(labelled, "format/all")
    if len(form) > WINDOW:
        best = max(range(len(correct) - WINDOW), key=lambda end: correct[end])  # windows that do not overlap the newest
        if correct[-1] <= (1 - CORRECT_FALL) * correct[best] and form[-1] >= form[best] + FORMAT_RISE:
            found["format_without_correctness"] = (
                f"format rises ({form[best]:.0%} to {form[-1]:.0%}) while correctness falls ({correct[best]:.0%} to "
                f"{correct[-1]:.0%}): it learns to please, not to calculate. Stop; lower the REWARD_WEIGHTS of the "
                "format, or the learning rate; the checkpoint with the best held-out accuracy is kept"
            )

    # A completion that never comes to its answer earns nothing, however good it is.
    cut_off, repeating = newest(history, "length/cut_off"), newest(history, "length/repeating")
    if cut_off > CUT_OFF:
        found["too_many_cut_off"] = (
            f"{cut_off:.0%} of the completions are cut off before their answer: raise MAX_COMPLETION_TOKENS"
        )
    if repeating > REPEATING:
        found["too_many_repeating"] = (
            f"{repeating:.0%} of the completions end in a repetition: more tokens will not help. Lower the learning "
            "rate, or begin with a model that train_sft.py has taught where answers end"
        )

    # In a group whose completions all earn the same every advantage is zero.
    zero_variance = newest(history, "reward/zero_variance_groups")
    if zero_variance > ZERO_VARIANCE:
        remedy = "raise COMPLETIONS_PER_QUESTION, take easier questions, or begin with a better model"
        if newest(history, "correctness/correct") > 0.5:
            remedy = "the questions have become too easy: stop here, or take harder ones"
        found["too_many_zero_variance_groups"] = (
            f"{zero_variance:.0%} of the groups have rewards without variance and teach nothing: {remedy}"
        )

    # Where the rewards make short answers pay, the model stops reasoning. Five steps can be enough for that.
    lengths = [row["length/thinking"] for row in history if "length/thinking" in row]
    if len(lengths) >= FIRST_STEPS + LAST_STEPS:
        first, last = fmean(lengths[:FIRST_STEPS]), fmean(lengths[-LAST_STEPS:])
        if last < SHORTER_THINKING * first:
            found["thinking_shrinks"] = (
                f"thinking shrank from {first:.0f} to {last:.0f} characters: read the samples. If the reasoning is "
                "gone, stop, and begin with a cold start (make_traces.py --example, train_sft.py), which brings the "
                "model's own reasoning into the format; or lower the learning rate, raise BETA, or pay short answers "
                "less"
            )

    # If sampling always gives the same completion, there is nothing to compare and nothing left to find.
    entropy = rolling(history, "training/entropy")
    if entropy and entropy[-1] < LOWER_ENTROPY * entropy[0]:
        found["entropy_collapsed"] = (
            f"entropy collapsed from {entropy[0]:.3f} to {entropy[-1]:.3f}: the model hardly explores any more. "
            "Lower the learning rate, or raise BETA"
        )
    return found


def not_finite(logs: dict, unmeasured: Collection[str] = ()) -> str | None:
    """The one fault that ends a run: a loss, gradient or reward that is not finite. The weights are then spoilt.

    `logs` is what TRL logged for a step. TRL has no means of the rewards that are `unmeasured` in it.
    """
    rewards = (name for name in logs if name.startswith("rewards/") and name.endswith("/mean"))
    watched = ["loss", "grad_norm", *(name for name in rewards if name.split("/")[1] not in unmeasured)]
    bad = [name for name in watched if name in logs and (logs[name] is None or not math.isfinite(logs[name]))]
    if not bad:
        return None
    mend = ", or mend the reward," if "reward" in logs else ""
    return (
        f"{', '.join(bad)} not finite: stopped, saving nothing. Lower the learning rate{mend} and continue "
        "the last checkpoint with --resume"
    )
