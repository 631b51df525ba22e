"""What a person watches while a run goes: the console, TensorBoard, samples and alarms.

The history of a run is a list of rows, one per step: {"step": 12, "reward/total": 5.1, "heldout/strict": 0.4, ...}.
On disk it lives in TensorBoard's files under `runs/` and nowhere else; alarms and curves are functions of it.
"""

from __future__ import annotations

import html
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from engine.accuracy import describe, evaluate
from engine.checkpoints import failure_of, write_text
from engine.console import UserError
from engine.numbers import extract_answer, thinking_of
from engine.questions import to_prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

    from engine.rollout import Rollout

History = list[dict[str, float]]

# ------------------------------------------------------------------------------------------------------ the alarms
WINDOW = 20  # steps; most alarms judge means over so many, because single steps are noise
REPEAT = 100  # steps until an alarm that still holds is raised again
FORMAT_RISE = 0.05  # an alarm: so many more of the completions earn the format rewards, while ...
CORRECT_FALL = 0.3  # ... this share of the right answers is lost
CUT_OFF = 0.2  # an alarm: more of the completions reach MAX_COMPLETION_TOKENS
REPEATING = 0.1  # an alarm: more of the completions end in a repetition
ZERO_VARIANCE = 0.8  # an alarm: in more of the groups all completions earn the same
SHORTER_THINKING = 0.5  # an alarm: the thinking is shorter than this share of its length at the start
FIRST_STEPS = 2  # what counts as the start of the thinking; a model can begin to guess within five steps
LAST_STEPS = 5  # what counts as the thinking of today
LOWER_ENTROPY = 0.1  # an alarm: less than this share of the entropy at the start


def rolling(history: History, tag: str) -> list[float]:
    """Means of `tag` over every WINDOW steps on end; empty before there are so many."""
    values = [row[tag] for row in history if tag in row]
    return [fmean(values[end - WINDOW : end]) for end in range(WINDOW, len(values) + 1)]


def format_without_correctness(history: History) -> str | None:
    """Since the best WINDOW steps the format has improved and the answers have worsened: what ruined the tutorial."""
    history = [row for row in history if "correctness/correct" in row]  # a step may have no question with a label
    correct, form = rolling(history, "correctness/correct"), rolling(history, "format/all")
    if len(correct) <= WINDOW:
        return None
    peak = max(range(len(correct) - WINDOW), key=lambda end: correct[end])  # of the windows apart from the newest
    if correct[-1] > (1 - CORRECT_FALL) * correct[peak] or form[-1] < form[peak] + FORMAT_RISE:
        return None
    return (
        f"format rises ({form[peak]:.0%} to {form[-1]:.0%}) while correctness falls ({correct[peak]:.0%} to "
        f"{correct[-1]:.0%}): it learns to please, not to calculate. Stop; give correctness_reward more of "
        "REWARD_WEIGHTS, or lower the learning rate; the checkpoint with the best held-out accuracy is kept"
    )


def too_many_cut_off(history: History) -> str | None:
    """Completions that never come to their answer earn nothing, however good they are."""
    cut_off = rolling(history, "length/cut_off")
    if not cut_off or cut_off[-1] <= CUT_OFF:
        return None
    return f"{cut_off[-1]:.0%} of the completions are cut off before their answer: raise MAX_COMPLETION_TOKENS"


def too_many_repeating(history: History) -> str | None:
    """A model that has lost its way, or was never taught to stop, says the same until it is cut off."""
    repeating = rolling(history, "length/repeating")
    if not repeating or repeating[-1] <= REPEATING:
        return None
    return (
        f"{repeating[-1]:.0%} of the completions end in a repetition: more tokens will not help. Lower the learning "
        "rate, or begin with a model that train_sft.py has taught where answers end"
    )


def too_many_zero_variance_groups(history: History) -> str | None:
    """In a group whose completions all earn the same every advantage is zero."""
    share, correct = rolling(history, "reward/zero_variance_groups"), rolling(history, "correctness/correct")
    if not share or share[-1] <= ZERO_VARIANCE:
        return None
    remedy = (
        "the questions have become too easy: stop here, or take harder ones"
        if correct and correct[-1] > 0.5
        else "raise COMPLETIONS_PER_QUESTION, take easier questions, or begin with a better model"
    )
    return f"{share[-1]:.0%} of the groups have rewards without variance and teach nothing: {remedy}"


def thinking_shrinks(history: History) -> str | None:
    """The model stops reasoning, as it does where the rewards make short answers pay.

    It can take five steps only: a real model that reasoned outside the format learned to guess in it.
    """
    rows = [row for row in history if "length/thinking" in row]
    if len(rows) < FIRST_STEPS + LAST_STEPS:
        return None
    parts = rows[:FIRST_STEPS], rows[-LAST_STEPS:]
    first, last = (fmean(row["length/thinking"] for row in part) for part in parts)
    if last >= SHORTER_THINKING * first:
        return None
    return (
        f"thinking shrank from {first:.0f} to {last:.0f} characters: read the samples. If the reasoning is gone, stop, "
        "and begin with a cold start (make_traces.py --example, train_sft.py), which brings the model's own reasoning "
        "into the format; or lower the learning rate, raise BETA, or pay short answers less"
    )


def entropy_collapsed(history: History) -> str | None:
    """Where sampling always gives the same completion there is nothing to compare and nothing left to find."""
    entropy = rolling(history, "training/entropy")
    if not entropy or entropy[-1] >= LOWER_ENTROPY * entropy[0]:
        return None
    return (
        f"entropy collapsed from {entropy[0]:.3f} to {entropy[-1]:.3f}: the model hardly explores any more. "
        "Lower the learning rate, or raise BETA"
    )


ALARMS = [
    format_without_correctness,
    too_many_cut_off,
    too_many_repeating,
    too_many_zero_variance_groups,
    thinking_shrinks,
    entropy_collapsed,
]


def not_finite(logs: dict, unmeasured: Collection[str] = ()) -> str | None:
    """The one trouble that ends a run: after such a step the weights are spoilt.

    Args:
        unmeasured: rewards that applied to no completion of this step; TRL gives them no mean.
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


# ------------------------------------------------------------------------------------------------------ the figures
TAGS = {  # TRL's name of a figure -> the group and the name under which TensorBoard shows it
    "reward": "reward/total",
    "reward_std": "reward/std",
    "completions/mean_length": "length/mean",
    "completions/min_length": "length/min",
    "completions/max_length": "length/max",
    "completions/clipped_ratio": "length/cut_off",
    "loss": "training/loss",
    "grad_norm": "training/grad_norm",
    "learning_rate": "training/learning_rate",
    "entropy": "training/entropy",
    "mean_token_accuracy": "training/token_accuracy",
    "kl": "training/kl",
    "clip_ratio/region_mean": "training/clipped",
    "epoch": "training/epoch",
    "preference_score": "preference/score",
}

HELD_OUT = ["Margin", ["heldout/strict", "heldout/strict_low", "heldout/strict_high"]]  # with its interval


def keep_samples_until(step: int, file: Path) -> None:
    """Drop what an interrupted run wrote after the checkpoint that is being continued, and a half-written line."""
    if file.exists():
        kept = []
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                with suppress(ValueError, TypeError, KeyError):  # of a power cut
                    if line.endswith("\n") and json.loads(line)["step"] <= step:
                        kept.append(line)
        write_text(file, "".join(kept))


# A completion repeats itself where its end compresses better than any prose does. The rate is Whisper's for the same
# trouble (arXiv 2212.04356, section 4.5). Of 658 Chinese answers of a 0.5B model it finds 13, all of which do repeat
# themselves: 12 of the 103 that were cut off, 1 of the others.
TAIL = 200  # characters
COMPRESSION = 2.4  # times smaller


def repeats_itself(completion: str) -> bool:
    """Whether it ends in a repetition, be it with a running number (`16. ... 17. ...`)."""
    tail = completion[-TAIL:].encode(errors="replace")
    return len(completion) >= TAIL and len(tail) > COMPRESSION * len(zlib.compress(tail))


def shown_rewards(sample: dict) -> list[str]:
    """The rewards of a sample in words, but for those that do not apply to it."""
    earned = {name.removesuffix("_reward"): value for name, value in sample["rewards"].items() if value is not None}
    return [f"{name} {value:.3g}" for name, value in earned.items()]


def preformatted(text: str) -> str:
    """Text that TensorBoard shows as it is, wrapped: it renders Markdown, where <think> would vanish and * mean bold.

    In <pre> a line of Chinese would run off the screen, and the sanitizer leaves no style to mend that.
    """
    return "<p>" + html.escape(text).replace("\n", "<br>") + "</p>"


def side_by_side(best: dict, worst: dict) -> str:
    """Two completions of one question as a TensorBoard table."""
    cells = ""
    for title, sample in (("best", best), ("worst", worst)):
        rewards = "\n".join(shown_rewards(sample))
        text = f"{title}, advantage {sample['advantage']:+.2f}\n{rewards}\n\n{sample['completion']}"
        cells += f"<td>{preformatted(text)}</td>"
    question = preformatted(f"{best['question']}\nlabel {best['label']}")
    return f"{question}<table><tr>{cells}</tr></table>"


# ---------------------------------------------------------------------------------------------------- the callbacks
class RunMonitor(TrainerCallback):
    """Watches one run and writes what it sees to the console and to the run's folder: what all kinds of runs share.

    A kind of run is a subclass. It has `describe_step(row)`, the figures of a step in words, `speed()`, the figures of
    speed for results.json, and `overview`, the curves that matter as SummaryWriter.add_custom_scalars takes them.

    Args:
        recipe: how often to look, at how many questions, and where to write.
        trainer: the run.
        rollout: whose sampler answers held-out questions.
        dev: development questions, which are not trained on. They are answered every EVAL_EVERY steps.
        test: test questions. They are answered before and after the training only.
        begun: the step of the checkpoint that is being continued; 0 for a new run.
        history: the rows of an earlier start of this run, up to that step; none where its curves were deleted.
    """

    def __init__(
        self,
        recipe: SimpleNamespace,
        trainer: Trainer,
        rollout: Rollout,
        dev: Dataset,
        test: Dataset,
        begun: int,
        history: History,
    ) -> None:
        self.recipe, self.output = recipe, Path(recipe.OUTPUT_DIR)
        self.trainer, self.rollout, self.dev, self.test = trainer, rollout, dev, test
        self.begun, self.history = begun, history
        self.board: SummaryWriter | None = None  # the main process has one
        if trainer.is_world_process_zero():
            # purge_step hides what an interrupted run logged after the checkpoint that this one continues
            self.board = SummaryWriter(self.output / "runs", purge_step=begun + 1)
            self.board.add_custom_scalars({"overview": self.overview})
            constants = "\n".join(f"{name} = {value!r}" for name, value in vars(recipe).items())
            self.board.add_text("recipe", preformatted(constants), begun)
        self.unwritten = False  # whether some curve or sample is missing on the disk, which is said once
        self.seconds_before = history[-1].get("speed/train_seconds", 0.0) if history else 0.0

    def print_plan(self, data: str, each_step: str, steps: int) -> None:
        """One block that says what is about to happen."""
        recipe, trainer = self.recipe, self.trainer
        device = trainer.accelerator.device
        precision = "float32 weights, bf16 autocast" if trainer.args.bf16 else "float32"
        print(
            f"model      {recipe.MODEL} ({f'LoRA rank {recipe.LORA_RANK}' if recipe.USE_LORA else 'all weights'})",
            f"data       {data}, {len(self.dev)} development and {len(self.test)} test questions",
            f"device     {trainer.accelerator.num_processes} x {device_name(device)}, {precision}",
            f"each step  {each_step}",
            f"steps      {recipe.MAX_STEPS if recipe.MAX_STEPS > 0 else steps}",
            f"output     {recipe.OUTPUT_DIR}",
            sep="\n",
            flush=True,
        )

    def measure_model(self, title: str, step: int) -> tuple[dict, str]:
        """Answer all test questions, the development questions and the probe, in the main process.

        Returns:
            The figures of the test questions, and the answer to the probe.
        """
        figures, _ = self.evaluate(self.test, title)
        print(f"{title:<11}{describe(figures)}", flush=True)
        strict = self.measure_held_out(step)["strict"]
        if step > 0:
            self.note_best(step, strict)
        _, [probe] = self.evaluate({"prompt": [to_prompt(self.recipe.PROBE_QUESTION)], "answer": [None]})
        return figures, probe["completion"]

    def measure_held_out(self, step: int) -> dict:
        """Answer the development questions, and add a point to the held-out curves."""
        figures, _ = self.evaluate(self.dev)
        print(f"held-out   {describe(figures)}", flush=True)
        low, high = figures["strict_ci95"]
        shown = figures | {"strict_low": low, "strict_high": high}
        self.record(step, {f"heldout/{k}": v for k, v in shown.items() if k not in ("n", "strict_ci95")})
        return figures

    def evaluate(self, questions: Dataset | dict, title: str | None = None) -> tuple[dict, list[dict]]:
        """`accuracy.evaluate` of the model as it is now."""
        recipe, sampler = self.recipe, self.rollout.sampler(self.trainer)
        tokenizer = self.trainer.processing_class
        return evaluate(sampler, tokenizer, questions, recipe.MAX_COMPLETION_TOKENS, recipe.EVAL_BATCH, title)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)  # the state of a checkpoint brings its own SAVE_EVERY
        self.train_began = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_seconds = time.perf_counter() - self.step_began
        # the last step's point comes with `after`
        self.due = state.global_step % self.recipe.EVAL_EVERY == 0 and state.global_step < state.max_steps
        control.should_log |= self.due or control.should_save  # nothing is saved that on_log has not seen

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        """Called at the end of a step, before its checkpoint is saved, with the same figures in every process."""
        if "loss" not in logs:  # the closing totals
            return
        if trouble := not_finite(logs, self.unmeasured()):
            if self.board:
                self.write(self.board.add_text, "alarm/not_finite", preformatted(trouble), state.global_step)
            raise UserError(f"step {state.global_step}: {trouble}")
        if self.board:  # in the main process
            self.record(state.global_step, self.measure(logs))
            self.print_step(state.max_steps)
        if self.due:
            figures = self.measure_held_out(state.global_step) if self.board else None
            control.should_save |= self.note_best(state.global_step, broadcast_object_list([figures])[0]["strict"])
        if self.board:
            self.show_more(state.global_step)
            self.write(self.board.flush)  # a killed run keeps its curves

    def unmeasured(self) -> list[str]:
        """The rewards that applied to nothing in this step."""
        return []

    def measure(self, logs: dict) -> dict[str, float]:
        """What TRL logged for this step, under the names that TensorBoard shows, and the time."""
        figures = {tag: logs[name] for name, tag in TAGS.items() if logs.get(name) is not None}
        figures["speed/step_seconds"] = self.step_seconds
        figures["speed/train_seconds"] = self.seconds_before + time.perf_counter() - self.train_began
        return figures

    def show_more(self, step: int) -> None:
        """What else one kind of run has to show after a step."""

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Add figures to the history, in memory and on disk."""
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1] |= figures
        for tag, value in figures.items():
            self.write(self.board.add_scalar, tag, value, step)

    def write(self, work: Callable[..., None], *args) -> None:
        """Write what a person looks at: a full disk costs that, and not the run."""
        fault = failure_of(work, *args)
        if fault and not self.unwritten:
            self.unwritten = True
            print(f"WARNING: curves or samples could not be written ({fault}). Training goes on", flush=True)

    def print_step(self, max_steps: int) -> None:
        """One line for the newest row of the history."""
        row = self.history[-1]
        timed = sum("speed/step_seconds" in each for each in self.history)
        left = row["speed/train_seconds"] / timed * (max_steps - row["step"])
        print(
            f"step {row['step']:>{len(str(max_steps))}}/{max_steps}"
            f"  {self.describe_step(row)}"
            f"  {row['speed/step_seconds']:.1f} s"
            f"  left {timedelta(seconds=round(left))}",
            flush=True,
        )

    def note_best(self, step: int, strict: float) -> bool:
        """Note a step that is better than every held-out point so far in the trainer's state; whether this one is.

        The state is part of each checkpoint, and the best one is spared when old ones are deleted.
        """
        state = self.trainer.state
        if state.best_metric is not None and strict <= state.best_metric:
            return False
        state.best_metric, state.best_global_step = strict, step
        return True

    def results(self) -> dict:
        """What the run cost and its best checkpoint, for results.json."""
        state, steps = self.trainer.state, [row for row in self.history if "speed/step_seconds" in row]
        return {
            "steps": state.global_step,
            "device": device_name(self.trainer.accelerator.device),
            "best": {"step": state.best_global_step, "strict": state.best_metric},
            "train_seconds": round(steps[-1]["speed/train_seconds"], 1) if steps else 0.0,
            **self.speed(),
            "step_seconds": round(median(row["speed/step_seconds"] for row in steps), 3) if steps else None,
            "peak_memory_gb": round(peak_memory_gb(), 2),
        }

    def print_summary(self, results: dict) -> None:
        """results.json, a line each."""
        for name, value in results.items():
            if name in ("before", "after"):
                value = describe(value)
            elif name == "probe":
                before, after = (extract_answer(value[when]) or "no answer" for when in ("before", "after"))
                value = f"{value['question']}: {before} before, {after} after"
            elif name == "best" and value["step"]:
                value = f"checkpoint-{value['step']}, strict {value['strict']:.1%} of the development questions"
            print(f"{name + ':':<29}{value}")


class Monitor(RunMonitor):
    """Watches a run of train_grpo.py: the rewards besides, samples and alarms."""

    overview = {
        "reward": ["Multiline", ["reward/total"]],
        "right answers among the samples": ["Multiline", ["correctness/correct"]],
        "held-out accuracy": HELD_OUT,
        "tokens of an answer": ["Multiline", ["length/mean"]],
        "answers cut off, groups without spread": ["Multiline", ["length/cut_off", "reward/zero_variance_groups"]],
        "entropy": ["Multiline", ["training/entropy"]],
    }

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.raised: dict[Callable, int] = {}  # alarm -> the step at which it was raised last
        if self.board and self.begun:
            keep_samples_until(self.begun, self.output / "samples.jsonl")

    def print_header(self, dropped: int) -> None:
        """The plan of the run; `dropped` counts the questions that were too long."""
        recipe, train = self.recipe, len(self.trainer.train_dataset)
        self.print_plan(
            f"{recipe.DATASET}: {train} training questions ({dropped} longer than {recipe.MAX_PROMPT_TOKENS} tokens "
            "dropped)",
            f"{recipe.QUESTIONS_PER_STEP} questions x {recipe.COMPLETIONS_PER_QUESTION} completions",
            math.ceil(recipe.EPOCHS * (train // recipe.QUESTIONS_PER_STEP)),
        )
        if recipe.REWARD_MODEL:
            unlabelled = sum(label is None for label in self.trainer.train_dataset["answer"])
            print(f"judged by  {recipe.REWARD_MODEL}: {unlabelled} training questions without a label", flush=True)

    def unmeasured(self) -> list[str]:
        """With a reward model, the rules on numbers where no question has a label, and the model where all have one."""
        if not self.recipe.REWARD_MODEL:
            return []
        labels = [label is not None for label in self.trainer._logs["extra"]["label"]]
        about_numbers = [] if any(labels) else ["digit_reward", "correctness_reward"]
        return about_numbers + (["preference_reward"] if all(labels) else [])

    def measure(self, logs: dict) -> dict[str, float]:
        """What TRL logged for this step and what it did not. A reward that applied to nothing has no figure."""
        means = {f"rewards/{name}/mean": f"reward/{name}" for name in self.trainer.reward_func_names}
        figures = super().measure(logs)
        figures |= {tag: logs[name] for name, tag in means.items() if logs.get(name) is not None}
        batch = self.trainer._logs  # the last generation batch of all processes
        applied = {name: [v for v in values if not math.isnan(v)] for name, values in batch["rewards"].items()}
        earned = {name: fmean(value > 0 for value in values) for name, values in applied.items() if values}
        if "correctness_reward" in earned:
            figures["correctness/correct"] = earned.pop("correctness_reward")
        figures["language/chinese"] = fmean(applied["language_reward"])
        for name in ("language_reward", "preference_reward"):  # shares, not something that is earned or not
            earned.pop(name, None)
        figures |= {f"format/{name.removesuffix('_reward')}": share for name, share in earned.items()}
        figures["format/all"] = fmean(earned.values())
        by_row, weights = zip(*batch["rewards"].values(), strict=True), self.trainer.reward_weights.tolist()
        totals = [sum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r)) for row in by_row]
        size = self.trainer.num_generations
        groups = [totals[start : start + size] for start in range(0, len(totals), size)]
        figures["reward/zero_variance_groups"] = fmean(max(group) - min(group) < 1e-6 for group in groups)
        texts = [message["content"] for [message] in batch["completion"]]
        figures["length/thinking"] = fmean(len(thinking_of(text)) for text in texts)
        figures["length/repeating"] = fmean(map(repeats_itself, texts))
        figures["speed/generated_tokens_per_second"] = self.rollout.tokens / max(self.rollout.seconds, 1e-9)
        return figures

    def describe_step(self, row: dict[str, float]) -> str:
        correct = f"{row['correctness/correct']:4.0%}" if "correctness/correct" in row else "   -"
        return (
            f"reward {row['reward/total']:.3f}"
            f"  correct {correct}"
            f"  format {row['format/soft_format']:4.0%}"
            f"  length {row['length/mean']:4.0f}"
            f"  cut off {row['length/cut_off']:4.0%}"
            f"  zero-variance {row['reward/zero_variance_groups']:4.0%}"
        )

    def speed(self) -> dict:
        tokens, seconds = self.rollout.tokens, self.rollout.seconds
        return {"generated_tokens_per_second": round(tokens / max(seconds, 1e-9))}

    def show_more(self, step: int) -> None:
        if step % self.recipe.SAMPLE_EVERY == 0 or step == 1:
            self.print_sample(self.sample(step, 0))
            self.write(self.keep_samples, step)
        self.raise_alarms(step)

    def keep_samples(self, step: int) -> None:
        """The best and the worst of the batch's first groups, in samples.jsonl and in TensorBoard."""
        size = self.trainer.num_generations
        with open(self.output / "samples.jsonl", "a", encoding="utf-8") as file:
            for group in range(min(2, self.recipe.QUESTIONS_PER_STEP)):
                samples = [self.sample(step, i) for i in range(group * size, (group + 1) * size)]
                samples.sort(key=lambda sample: sample["advantage"])
                best, worst = samples[-1], samples[0]
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in (best, worst))
                self.board.add_text(f"samples/group_{group + 1}", side_by_side(best, worst), step)

    def sample(self, step: int, row: int) -> dict:
        """One completion of the last generation batch."""
        batch = self.trainer._logs
        labels = batch["extra"].get("label")  # correctness_reward logs them; another one may not
        completion, question = batch["completion"][row][0]["content"], batch["prompt"][row][-1]["content"]
        return {
            "step": step,
            "question": question,
            "label": labels[row] if labels else None,
            "completion": completion,
            "extracted": extract_answer(completion),
            "rewards": {
                name: None if math.isnan(values[row]) else values[row] for name, values in batch["rewards"].items()
            },
            "advantage": batch["advantages"][row],
        }

    def print_sample(self, sample: dict) -> None:
        """A completion as a person reads it."""
        print(f"  question   {sample['question']}  (label {sample['label']})")
        print("\n".join("  | " + line for line in sample["completion"].splitlines()))
        print(f"  extracted  {sample['extracted']}   {'  '.join(shown_rewards(sample))}", flush=True)

    def raise_alarms(self, step: int) -> None:
        """Say what looks wrong, in the console and in TensorBoard; what stays wrong is said again now and then."""
        for check in ALARMS:
            message = check(self.history)
            if message and step >= self.raised.get(check, -REPEAT) + REPEAT:
                self.raised[check] = step
                print(f"ALARM      {message}", flush=True)
                self.write(self.board.add_text, f"alarm/{check.__name__}", preformatted(message), step)


class SftMonitor(RunMonitor):
    """Watches a run of train_sft.py."""

    overview = {
        "loss": ["Multiline", ["training/loss"]],
        "tokens guessed right": ["Multiline", ["training/token_accuracy"]],
        "held-out accuracy": HELD_OUT,
    }

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.tokens = 0  # that this start has trained on, prompts included

    def print_header(self, what: str) -> None:
        """The plan of the run; `what` it learns, in words."""
        recipe, rows = self.recipe, len(self.trainer.train_dataset)
        steps = math.ceil(recipe.EPOCHS * math.ceil(rows / recipe.ROWS_PER_STEP))
        self.print_plan(f"{what}; {recipe.DATASET}", f"{recipe.ROWS_PER_STEP} rows", steps)

    def measure(self, logs: dict) -> dict[str, float]:
        """What TRL logged for this step, and the tokens trained on."""
        new, self.tokens = logs["num_tokens"] - self.tokens, logs["num_tokens"]
        return super().measure(logs) | {"speed/trained_tokens_per_second": new / self.step_seconds}

    def describe_step(self, row: dict[str, float]) -> str:
        return (
            f"loss {row['training/loss']:.4f}"
            f"  tokens right {row['training/token_accuracy']:4.0%}"
            f"  learning rate {row['training/learning_rate']:.1e}"
        )

    def speed(self) -> dict:
        rows = [row["speed/trained_tokens_per_second"] for row in self.history if "speed/step_seconds" in row]
        return {"trained_tokens_per_second": round(median(rows)) if rows else 0}


def device_name(device: torch.device) -> str:
    """'NVIDIA H200' or 'CPU'"""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory_gb() -> float:
    """GPU memory that was reserved at the most, captured graphs included; without CUDA this process's memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
