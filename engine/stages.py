"""The stages of train_r1.py: each is a script's `main` in child processes, and what is done is remembered."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from engine.console import UserError, first_line, note, run
from engine.folder import write_text

CONTEXT = multiprocessing.get_context("spawn")  # a new Python each time: it reads its environment, and frees a GPU


class Command(NamedTuple):
    """A call of one of the scripts: `main(argv, **constants)`."""

    script: str  # the module's name, such as "train_grpo"
    argv: list[str]
    constants: dict[str, Any]

    @property
    def output(self) -> Path:
        """The folder that it writes to."""
        return Path(self.argv[self.argv.index("--output") + 1])

    def __str__(self) -> str:
        """The command as a person would type it, with the constants to edit before."""
        start = f"python {self.script}.py" if "." not in self.script else f"python -m {self.script}"
        constants = ", ".join(f"{name} = {value!r}" for name, value in self.constants.items())
        return f"{start} {shlex.join(self.argv)}" + (f"    # with {constants}" if constants else "")

    def is_training(self) -> bool:
        return self.script.startswith("train_")

    def is_finished(self) -> bool:
        """Whether nothing is left to do. make_traces.py answers that by itself."""
        if self.is_training():
            return read_json(self.output / "results.json").get("finished", False)
        if self.script == "evaluate":
            return ("samples" if "--samples" in self.argv else "n") in read_json(self.output / "eval.json")
        return self.script == "engine.average" and (self.output / "model.safetensors").exists()


class Stage(NamedTuple):
    """What the plan says of a stage."""

    what: str  # in words
    answers: int  # that it draws or learns from, by which the time left is told


class Stages:
    """The stages of one path, each in a numbered folder. stages.json says which are done and what questions they took.

    Args:
        output: the folder of the path.
        plan: the stages by name, in their order.
        workers: the environments of the processes that may run side by side.
    """

    def __init__(self, output: Path, plan: dict[str, Stage], workers: list[dict[str, str]]) -> None:
        self.output, self.plan, self.workers = output, plan, workers
        kept = read_json(output / "stages.json")
        self.seconds: dict[str, float] = kept.get("seconds", {})  # of each stage, over all starts
        self.done: list[str] = kept.get("done", [])
        self.skipped: list[str] = []
        self.questions: dict[str, list[int]] = kept.get("questions", {})  # stage -> first question and the one behind

    def _save(self) -> None:
        kept = {"done": self.done, "seconds": self.seconds, "questions": self.questions}
        write_text(self.output / "stages.json", json.dumps(kept, indent=1) + "\n")

    def folder(self, name: str) -> Path:
        """Where a stage writes, such as output/r1/03-cold-start."""
        return self.output / f"{[*self.plan].index(name) + 1:02}-{name}"

    def take_questions(self, name: str, count: int) -> str:
        """The next `count` unused questions of the shuffled order as FROM:TO, the same ones whenever it is asked."""
        known = self.questions.get(name, [0, 0])
        if name not in self.done and known[1] - known[0] != count:
            first = max((end for other, (_, end) in self.questions.items() if other != name), default=0)
            self.questions[name] = [first, first + count]
            self._save()
        first, end = self.questions[name]
        return f"{first}:{end}"

    def say(self, name: str, rest: str) -> None:
        print(f"\n===== stage {[*self.plan].index(name) + 1} of {len(self.plan)}  {name}: {rest}", flush=True)

    def undo(self, name: str) -> None:
        """Let a stage run again, on more questions say."""
        self.done.remove(name)
        self._save()

    def skip(self, name: str, why: str) -> None:
        """A stage of the plan that is not needed."""
        self.skipped.append(name)
        self.say(name, f"not needed, {why}")

    def run(self, name: str, *lanes: list[Command]) -> None:
        """Run a stage unless it is done.

        Args:
            lanes: commands that follow each other; several lanes may run side by side.

        Raises:
            UserError: a command has failed; it has said why.
        """
        if name in self.done:
            self.say(name, f"done, {timedelta(seconds=round(self.seconds[name]))}")
            return
        self.say(name, self.plan[name].what + self._left())
        for command in (command for lane in lanes for command in lane):
            print(f"      {command}", flush=True)
        start = time.perf_counter()
        try:
            run_side_by_side(lanes, self.workers, self.folder(name))
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._save()
        self.done.append(name)
        self._save()

    def _left(self) -> str:
        """The time that the rest will take at the speed of the stages so far; empty in the first one.

        That speed is their median. A stage that was stopped often has taken much longer than it needs.
        """
        speeds = [self.seconds[name] / self.plan[name].answers for name in self.done if name in self.plan]
        if not speeds:
            return ""
        left = sum(stage.answers for name, stage in self.plan.items() if name not in self.done + self.skipped)
        seconds = round(statistics.median(speeds) * left)
        return f"; all that is left takes about {timedelta(seconds=seconds)}"


# ---------------------------------------------------------------------------------------------- the child processes
def run_side_by_side(lanes: tuple[list[Command], ...], workers: list[dict[str, str]], folder: Path) -> None:
    """Run lanes of commands, as many at a time as there are workers. Only the first worker's lines are shown.

    A stop signal is handed on to the commands, which save what they have; then this program ends too.

    Raises:
        UserError: a command has failed. The others are stopped first.
    """
    workers = workers if len(lanes) > 1 else [{}]  # one alone has the whole machine
    waiting = [[command for lane in lanes[i :: len(workers)] for command in lane] for i in range(len(workers))]
    consoles = [None, *(folder / f"console-{i + 1}.txt" for i in range(1, len(workers)))]
    running: dict[int, tuple[Command, multiprocessing.Process]] = {}  # by the number of the worker
    signals: list[int] = []  # that this process has received
    failed = None  # the exit code of the first command that has failed

    def start_next(worker: int) -> None:
        while waiting[worker] and waiting[worker][0].is_finished():
            drop_checkpoints(waiting[worker].pop(0))
        if waiting[worker] and not signals and failed is None:
            command = waiting[worker].pop(0)
            process = CONTEXT.Process(target=call, args=(command, workers[worker], consoles[worker]))
            process.start()
            running[worker] = command, process

    def receive(number: int, frame) -> None:
        signals.append(number)
        if number != signal.SIGINT:  # which the terminal sends to the commands as well
            stop_all()

    def stop_all() -> None:
        for _, process in running.values():
            process.terminate()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, receive) for number in numbers}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for worker in range(len(workers)):
            start_next(worker)
        while running:
            wait([process.sentinel for _, process in running.values()])
            for worker, (command, process) in [*running.items()]:
                if process.exitcode is not None:
                    del running[worker]
                if process.exitcode == 0:
                    drop_checkpoints(command)
                    start_next(worker)
                elif process.exitcode and failed is None:
                    failed = process.exitcode
                    stop_all()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        print(f"stopped; go on with\n    {own_command()}", flush=True)
        sys.exit(128 + signals[0])
    if failed is not None:
        shown = f" or those of {consoles[1].parent}" if len(workers) > 1 else ""
        raise UserError(
            f"this stage has failed (exit code {failed}); its last lines{shown} say why. Mend that and go on with "
            f"{own_command()}"
        )


def drop_checkpoints(command: Command) -> None:
    """Delete the checkpoints of a finished training. Its model stays."""
    if command.is_training():
        for checkpoint in command.output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def own_command() -> str:
    """The command that started this path."""
    return f"python {shlex.join(sys.argv)}"


def call(command: Command, environment: dict[str, str], console: Path | None) -> None:
    """Run a command in this child process, until its end or until the parent ends.

    Args:
        environment: variables that libraries read when they are imported, which happens here and no sooner.
        console: a file that gets what is printed; None: the parent's console.
    """
    os.environ.update(environment, GO_ON_WITH=own_command())
    if console:
        with open(console, "a", encoding="utf-8") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    threading.Thread(target=stop_with_parent, daemon=True).start()
    resume = command.is_training() and any(command.output.glob("checkpoint-*"))
    argv = [*command.argv, *["--resume"] * resume]
    run(lambda: importlib.import_module(command.script).main(argv, **command.constants))


def stop_with_parent() -> None:
    """Stop this process in order when its parent has been killed: nobody would start the next command."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------------------------- before the start
def find_workers(cpu: bool, demo: bool) -> list[dict[str, str]]:
    """The environments of the processes that may run side by side: one a GPU, or two that share the cores.

    Raises:
        UserError: there is no GPU, and neither --demo nor --cpu was given.
    """
    import torch

    count = 0 if cpu else torch.cuda.device_count()
    if not (count or cpu or demo):
        raise UserError("no CUDA GPU found; --demo shows the path on any machine, --small --cpu takes hours")
    if count:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = named.split(",")[:count] if named else [str(number) for number in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": card} for card in cards]
    cores = os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": str(max(cores // 2, 1))}] * min(cores, 2)


def check_disk(output: Path, model: str, models: int, checkpoints: int, lora: bool) -> str:
    """What a path needs on the disk, in words.

    Args:
        models: how many it keeps.
        checkpoints: how many lie there at the same time.
        lora: whether these hold an adapter only.

    Raises:
        UserError: there is less.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model {model!r} cannot be read: {first_line(error)}; name another with --model"
        ) from error
    size = 4 * sum(parameter.numel() for parameter in shape.parameters())
    needed = models * size + checkpoints * (size // 10 if lora else 3 * size)  # with the two moments of Adam
    held = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    free = shutil.disk_usage(output).free
    if free < needed - held:
        raise UserError(
            f"{str(output)!r} has {free / 1e9:.1f} GB free and this path needs {(needed - held) / 1e9:.1f} GB more: "
            "free some, name another --output, or lower ROUNDS or RUNS_PER_ROUND"
        )
    return f"{needed / 1e9:.1f} GB needed for {models} models and their checkpoints, {free / 1e9:.1f} GB free"


def keep_settings(output: Path, settings: dict[str, Any], fixed: tuple[str, ...]) -> None:
    """Record what this path is made with in settings.json, and name what has changed since it was begun.

    Raises:
        UserError: one of `fixed` has changed: the stages that are done belong to another path.
    """
    settings = json.loads(json.dumps(settings, default=lambda reward: reward.__name__))
    before = read_json(output / "settings.json")
    for name, value in before.items():
        if settings.get(name) != value and name in fixed:
            raise UserError(
                f"{name} was {value!r} and is {settings.get(name)!r}: the stages in {str(output)!r} belong to the "
                "old one; change it back, or name another --output"
            )
        if settings.get(name) != value:
            note(f"{name} was {value!r} and is {settings.get(name)!r} in the stages to come; those that are done stay")
    write_text(output / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """A JSON file that a stage wrote; {} where it is not there yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
