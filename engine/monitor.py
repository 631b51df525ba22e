"""What a person watches while a run goes: the console, TensorBoard, samples and alarms.

The history of a run (`alarms.History`) is kept in memory and in TensorBoard's files under `runs/`.
"""

from __future__ import annotations

import html
import json
import math
import sys
import time
import zlib
from collections.abc import Callable
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

from engine.accuracy import describe, evaluate, needs_cold_start
from engine.alarms import REPEAT, History, find_alarms, not_finite
from engine.checkpoints import failure_of, write_text
from engine.console import UserError
from engine.curves import PANELS, SFT_PANELS
from engine.numbers import extract_answer, thinking_of
from engine.questions import to_prompt
from engine.templates import PLAIN_TEMPLATE, own_template

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

    from engine.rollout import Rollout

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

# A completion ends in a repetition if its last characters compress better than any prose does. The rate is the one
# that Whisper uses for the same fault (arXiv 2212.04356, section 4.5). Of 658 Chinese answers of a 0.5B model it finds
# 13, all of which do repeat themselves.
TAIL = 200  # characters
COMPRESSION = 2.4  # times smaller


def repeats_itself(completion: str) -> bool:
    """Whether the completion ends in a repetition, with a running number (`16. ... 17. ...`) or without."""
    tail = completion[-TAIL:].encode(errors="replace")
    return len(completion) >= TAIL and len(tail) > COMPRESSION * len(zlib.compress(tail))


def keep_samples_until(step: int, file: Path) -> None:
    """Drop the samples that an interrupted run wrote after `step`, and lines that a kill or power cut has damaged."""
    if not file.exists():
        return
    kept = []
    for line in file.read_bytes().split(b"\n")[:-1]:  # what stands behind the last newline is half a line
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
    write_text(file, "".join(kept))


def shown_rewards(sample: dict) -> list[str]:
    """The rewards of a sample in words, without those that do not apply to it."""
    earned = {name.removesuffix("_reward"): value for name, value in sample["rewards"].items() if value is not None}
    return [f"{name} {value:.3g}" for name, value in earned.items()]


def preformatted(text: str) -> str:
    """Escaped text for TensorBoard, which renders Markdown. A long line of Chinese would not wrap inside <pre>."""
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
    """Watches one run, and writes what it sees to the console and to the run's folder.

    A kind of run is a subclass with `describe_step(row)`, which puts the figures of a step into words.

    Args:
        rollout: makes the sampler that answers held-out questions.
        dev: development questions, answered every EVAL_EVERY steps.
        test: test questions, answered only before and after the training.
        begun: the step of the checkpoint that the run continues; 0 for a new run.
        history: the rows of an earlier start of this run up to that step; [] for a new run.
    """

    panels: dict  # the charts of TensorBoard's overview, as in curves.py
    speed: str  # the figure of speed that results.json holds

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
        self.board: SummaryWriter | None = None  # only the main process has one
        if trainer.is_world_process_zero():
            # purge_step hides what an interrupted run logged after the checkpoint that this one continues
            self.board = SummaryWriter(self.output / "runs", purge_step=begun + 1)
            charts = {title: ["Multiline", list(curves)] for title, curves in self.panels.items()}
            self.board.add_custom_scalars({"overview": charts})
            constants = "\n".join(f"{name} = {value!r}" for name, value in vars(recipe).items())
            self.board.add_text("recipe", preformatted(constants), begun)
        self.warned = False  # whether the user knows that some curve or sample could not be written
        self.seconds_before = history[-1].get("speed/train_seconds", 0.0) if history else 0.0

    def print_plan(self, data: str, each_step: str, steps: int) -> None:
        """Print what is about to happen."""
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

    # ---- measuring the model
    def measure_model(self, title: str, step: int) -> tuple[dict, str]:
        """Answer the test questions, the development questions and the probe, in the main process.

        Returns the figures of the test questions and the answer to the probe.
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

    def note_best(self, step: int, strict: float) -> bool:
        """Whether this held-out accuracy is the best so far. If it is, the trainer's state says so from now on.

        The state is part of each checkpoint, and the best checkpoint is spared when old ones are deleted.
        """
        state = self.trainer.state
        if state.best_metric is not None and strict <= state.best_metric:
            return False
        state.best_metric, state.best_global_step = strict, step
        return True

    # ---- what the trainer calls
    def on_train_begin(self, args, state, control, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)  # else the SAVE_EVERY of the checkpoint's own state would hold
        self.train_began = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_seconds = time.perf_counter() - self.step_began
        # after the last step the model is measured anyway
        self.due = state.global_step % self.recipe.EVAL_EVERY == 0 and state.global_step < state.max_steps
        control.should_log |= self.due or control.should_save  # a step is recorded before it is saved

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        """Called at the end of a step, before its checkpoint is saved, with the same figures in every process."""
        if "loss" not in logs:  # the totals at the end of the training
            return
        if trouble := not_finite(logs, self.unmeasured()):
            if self.board:
                self.write(self.board.add_text, "alarm/not_finite", preformatted(trouble), state.global_step)
            raise UserError(f"step {state.global_step}: {trouble}")
        if self.board:
            self.record(state.global_step, self.measure(logs))
            self.print_step(state.max_steps)
        if self.due:
            figures = self.measure_held_out(state.global_step) if self.board else None
            control.should_save |= self.note_best(state.global_step, broadcast_object_list([figures])[0]["strict"])
        if self.board:
            self.show_more(state.global_step)
            self.write(self.board.flush)  # a killed run keeps its curves

    def unmeasured(self) -> list[str]:
        """The rewards that applied to no completion of this step.

        With a reward model these are the rules about numbers if no question has a label, or the reward model if all
        questions have one.
        """
        if not getattr(self.recipe, "REWARD_MODEL", ""):
            return []
        labelled = [label is not None for label in self.trainer._logs["extra"]["label"]]
        about_numbers = [] if any(labelled) else ["digit_reward", "correctness_reward"]
        return about_numbers + (["preference_reward"] if all(labelled) else [])

    def measure(self, logs: dict) -> dict[str, float]:
        """The figures of a step: what TRL logged, under the names that TensorBoard shows, and the time."""
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
        """Write curves or samples. If the disk is full, they are lost and one line says so; the run goes on."""
        fault = failure_of(work, *args)
        if fault and not self.warned:
            self.warned = True
            print(f"WARNING: curves or samples could not be written ({fault}). Training goes on", flush=True)

    # ---- what is printed
    def print_step(self, max_steps: int) -> None:
        """Print the newest row of the history in one line."""
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

    def results(self) -> dict:
        """The cost of the run and its best checkpoint, for results.json."""
        state, steps = self.trainer.state, [row for row in self.history if "speed/step_seconds" in row]
        return {
            "steps": state.global_step,
            "device": device_name(self.trainer.accelerator.device),
            "best": {"step": state.best_global_step, "strict": state.best_metric},
            "train_seconds": round(steps[-1]["speed/train_seconds"], 1) if steps else 0.0,
            self.speed: round(median(row[f"speed/{self.speed}"] for row in steps)) if steps else 0,
            "step_seconds": round(median(row["speed/step_seconds"] for row in steps), 3) if steps else None,
            "peak_memory_gb": round(peak_memory_gb(), 2),
        }

    def print_summary(self, results: dict) -> None:
        """Print results.json, one line for each entry."""
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
    """Watches a run of train_grpo.py: besides the above its rewards, samples and alarms."""

    panels, speed = PANELS, "generated_tokens_per_second"

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.raised: dict[str, int] = {}  # alarm -> the last step at which it was raised
        if self.board and self.begun:
            keep_samples_until(self.begun, self.output / "samples.jsonl")

    def print_header(self, dropped: int) -> None:
        """Print the plan of the run; `dropped` questions were too long."""
        recipe, train = self.recipe, len(self.trainer.train_dataset)
        self.print_plan(
            f"{recipe.DATASET}: {train} training questions ({dropped} longer than {recipe.MAX_PROMPT_TOKENS} tokens "
            "dropped)",
            f"{recipe.QUESTIONS_PER_STEP} questions x {recipe.COMPLETIONS_PER_QUESTION} completions, "
            f"{recipe.MICRO_BATCH} at a time (MICRO_BATCH)",
            math.ceil(recipe.EPOCHS * (train // recipe.QUESTIONS_PER_STEP)),
        )
        if recipe.REWARD_MODEL:
            unlabelled = sum(label is None for label in self.trainer.train_dataset["answer"])
            print(f"judged by  {recipe.REWARD_MODEL}: {unlabelled} training questions without a label", flush=True)

    def measure_model(self, title: str, step: int) -> tuple[dict, str]:
        """As above. Before the training it also says so where the model needs a cold start."""
        figures, probe = super().measure_model(title, step)
        if step == 0 and needs_cold_start(figures):
            seen = f"strict {figures['strict']:.1%} is less than half of flexible {figures['flexible']:.1%}"
            if own_template(self.trainer.processing_class.chat_template) == PLAIN_TEMPLATE:
                print(f"note: {seen}: this base model has to find the format by itself first (R1-Zero)", flush=True)
            else:
                print(
                    f"WARNING: {seen}: GRPO alone finds few right answers in the format to learn from, and where the "
                    "format is paid it costs the model its reasoning, as was seen on a real model (docs/results.md). "
                    "train_r1.py begins with a cold start. Training goes on",
                    flush=True,
                )
        return figures, probe

    def measure(self, logs: dict) -> dict[str, float]:
        """Besides, figures of the completions. A reward that applied to no completion has no figure."""
        figures = super().measure(logs)
        batch = self.trainer._logs  # the last generation batch of all processes
        for name, values in batch["rewards"].items():
            if logs.get(f"rewards/{name}/mean") is not None:
                figures[f"reward/{name}"] = logs[f"rewards/{name}/mean"]
            earned = [value > 0 for value in values if not math.isnan(value)]  # NaN: the reward does not apply
            if name == "language_reward":
                figures["language/chinese"] = fmean(values)
            elif name == "correctness_reward" and earned:
                figures["correctness/correct"] = fmean(earned)
            elif name != "preference_reward" and earned:
                figures[f"format/{name.removesuffix('_reward')}"] = fmean(earned)
        figures["format/all"] = fmean(value for tag, value in figures.items() if tag.startswith("format/"))
        advantages, size = list(batch["advantages"]), self.trainer.num_generations
        groups = [advantages[start : start + size] for start in range(0, len(advantages), size)]
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

    def show_more(self, step: int) -> None:
        if step % self.recipe.SAMPLE_EVERY == 0 or step == 1:
            self.print_sample(self.sample(step, 0))
            self.write(self.keep_samples, step)
        self.raise_alarms(step)

    def keep_samples(self, step: int) -> None:
        """Write the best and the worst completion of the first groups to samples.jsonl and to TensorBoard."""
        size = self.trainer.num_generations
        with open(self.output / "samples.jsonl", "a", encoding="utf-8") as file:
            for group in range(min(2, self.recipe.QUESTIONS_PER_STEP)):
                samples = [self.sample(step, i) for i in range(group * size, (group + 1) * size)]
                worst, *_, best = sorted(samples, key=lambda sample: sample["advantage"])
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in (best, worst))
                self.board.add_text(f"samples/group_{group + 1}", side_by_side(best, worst), step)

    def sample(self, step: int, row: int) -> dict:
        """A completion of the last generation batch, as a line of samples.jsonl."""
        batch = self.trainer._logs
        labels = batch["extra"].get("label")  # logged by correctness_reward, which may have been replaced
        completion = batch["completion"][row][0]["content"]
        rewards = {name: values[row] for name, values in batch["rewards"].items()}
        return {
            "step": step,
            "question": batch["prompt"][row][-1]["content"],
            "label": labels[row] if labels else None,
            "completion": completion,
            "extracted": extract_answer(completion),
            "rewards": {name: None if math.isnan(value) else value for name, value in rewards.items()},
            "advantage": batch["advantages"][row],
        }

    def print_sample(self, sample: dict) -> None:
        print(f"  question   {sample['question']}  (label {sample['label']})")
        print("\n".join("  | " + line for line in sample["completion"].splitlines()))
        print(f"  extracted  {sample['extracted']}   {'  '.join(shown_rewards(sample))}", flush=True)

    def raise_alarms(self, step: int) -> None:
        """Print what looks wrong, and write it to TensorBoard; again after REPEAT steps if it stays wrong."""
        for name, message in find_alarms(self.history).items():
            if step >= self.raised.get(name, -REPEAT) + REPEAT:
                self.raised[name] = step
                print(f"ALARM      {message}", flush=True)
                self.write(self.board.add_text, f"alarm/{name}", preformatted(message), step)


class SftMonitor(RunMonitor):
    """Watches a run of train_sft.py."""

    panels, speed = SFT_PANELS, "trained_tokens_per_second"

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.tokens = 0  # trained on since this start, prompts included

    def print_header(self, what: str) -> None:
        """Print the plan of the run; `what` says what it learns."""
        recipe, rows = self.recipe, len(self.trainer.train_dataset)
        steps = math.ceil(recipe.EPOCHS * math.ceil(rows / recipe.ROWS_PER_STEP))
        each_step = f"{recipe.ROWS_PER_STEP} rows, {recipe.MICRO_BATCH} at a time (MICRO_BATCH)"
        self.print_plan(f"{what}; {recipe.DATASET}", each_step, steps)

    def measure(self, logs: dict) -> dict[str, float]:
        """Besides, the tokens trained on."""
        new, self.tokens = logs["num_tokens"] - self.tokens, logs["num_tokens"]
        return super().measure(logs) | {"speed/trained_tokens_per_second": new / self.step_seconds}

    def describe_step(self, row: dict[str, float]) -> str:
        return (
            f"loss {row['training/loss']:.4f}"
            f"  tokens right {row['training/token_accuracy']:4.0%}"
            f"  learning rate {row['training/learning_rate']:.1e}"
        )


def device_name(device: torch.device) -> str:
    """Such as 'NVIDIA H200' or 'CPU'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory_gb() -> float:
    """The most GPU memory that was reserved, with captured graphs; without CUDA the most memory of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
