"""What a person watches while a run goes: one line a step, completions to read, curves in TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from evaluate import describe
from rewards import extract_answer


def clock(seconds: float) -> str:
    """3725.0 -> '1 h 02 min'"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class Monitor(TrainerCallback):
    """Console, samples and TensorBoard for one run.

    Args:
        output: the run's folder; scalars go to its `runs/`, samples to its `samples.jsonl`.
        sample_every: steps between two samples.
    """

    def __init__(self, output: Path, sample_every: int) -> None:
        self.output, self.sample_every = output, sample_every
        self.step_seconds: list[float] = []
        self.train_seconds = 0.0
        self.board: SummaryWriter | None = None

    def watch(self, trainer, rollout) -> None:
        """Tell the monitor whom it watches; they exist only after it."""
        self.trainer, self.rollout = trainer, rollout
        rows = trainer.train_dataset
        questions = [prompt[-1]["content"] for prompt in rows["prompt"]]
        self.labels = dict(zip(questions, rows["answer"], strict=True))

    def print_header(self, recipe, device, autocast, processes: int, train: int, dropped: int, test: int) -> None:
        """One block that says what is about to happen."""
        precision = "float32 weights, bf16 autocast" if autocast else "float32"
        if device.type == "cuda" and not autocast:
            precision += " (this GPU has no bf16; fp16 would overflow)"
        all_steps = recipe.EPOCHS * (train // recipe.QUESTIONS_PER_STEP)
        trained = f"LoRA rank {recipe.LORA_RANK}" if recipe.USE_LORA else "all weights"
        print(
            f"model      {recipe.MODEL} ({trained})",
            f"data       {recipe.DATASET}: {train} training questions ({dropped} longer than "
            f"{recipe.MAX_PROMPT_TOKENS} tokens dropped), {test} test questions",
            f"device     {processes} x {device_name(device)}, {precision}",
            f"each step  {recipe.QUESTIONS_PER_STEP} questions x {recipe.COMPLETIONS_PER_QUESTION} completions",
            f"steps      {self.trainer.args.max_steps if recipe.MAX_STEPS > 0 else all_steps}",
            f"output     {recipe.OUTPUT_DIR}",
            sep="\n",
            flush=True,
        )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.train_began = time.perf_counter()
        if state.is_world_process_zero:
            # purge_step drops what an interrupted run logged after the checkpoint that this one continues
            self.board = SummaryWriter(self.output / "runs", purge_step=state.global_step + 1)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_seconds.append(time.perf_counter() - self.step_began)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if self.board is None or "reward" not in logs:  # another rank, or the closing totals
            return
        for name, value in logs.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, state.global_step)
        self.board.flush()  # a killed run keeps its curves
        seconds = self.step_seconds[-1]
        left = median(self.step_seconds[-20:]) * (state.max_steps - state.global_step)
        print(
            f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            f"  reward {logs['reward']:.3f}"
            f"  correct {logs['rewards/correctness_reward/mean'] / 2:4.0%}"
            f"  format {logs['rewards/soft_format_reward/mean'] / 0.5:4.0%}"
            f"  length {logs['completions/mean_length']:4.0f}"
            f"  cut off {logs['completions/clipped_ratio']:4.0%}"
            f"  {seconds:.1f} s  left {clock(left)}",
            flush=True,
        )
        if state.global_step % self.sample_every == 0 or state.global_step == 1:
            self.show_sample(state.global_step)

    def show_sample(self, step: int) -> None:
        """Print the batch's first completion and keep it in samples.jsonl."""
        logs = self.trainer._logs  # the last generation batch; holds it whether or not completions are logged
        completion = logs["completion"][0][0]["content"]
        sample = {
            "step": step,
            "question": logs["prompt"][0][-1]["content"],
            "label": self.labels[logs["prompt"][0][-1]["content"]],
            "completion": completion,
            "extracted": extract_answer(completion),
            "rewards": {name: values[0] for name, values in logs["rewards"].items()},
            "advantage": logs["advantages"][0],
        }
        with open(self.output / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        rewards = "  ".join(f"{name.removesuffix('_reward')} {value:g}" for name, value in sample["rewards"].items())
        print(f"  question   {sample['question']}  (label {sample['label']})")
        print("\n".join("  | " + line for line in completion.splitlines()))
        print(f"  extracted  {sample['extracted']}   {rewards}", flush=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.train_seconds += time.perf_counter() - self.train_began
        if self.board is not None:
            self.board.close()

    def results(self) -> dict:
        """What the run cost, for results.json."""
        return {
            "steps": self.trainer.state.global_step,
            "device": device_name(self.trainer.accelerator.device),
            "train_seconds": round(self.train_seconds, 1),
            "generated_tokens_per_second": round(self.rollout.tokens / max(self.rollout.seconds, 1e-9)),
            "step_seconds": round(median(self.step_seconds), 3) if self.step_seconds else None,
            "peak_memory_gb": round(peak_memory_gb(), 2),
        }

    def print_summary(self, results: dict) -> None:
        """results.json, a line each."""
        for name, value in results.items():
            if name in ("before", "after"):
                value = describe(value)
            elif name == "probe":
                value = f"{value['question']}: {say_answer(value['before'])} before, {say_answer(value['after'])} after"
            print(f"{name + ':':<29}{value}")


def device_name(device: torch.device) -> str:
    """'NVIDIA H200' or 'CPU'"""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def say_answer(completion: str) -> str:
    """What a completion answers, in one word."""
    return extract_answer(completion) or "no answer"


def peak_memory_gb() -> float:
    """GPU memory that tensors took at the most; without CUDA this process's memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
