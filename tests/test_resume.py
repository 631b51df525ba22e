"""A resumed run asks the questions that an undisturbed one asks, in whatever pass it was stopped; small things of a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from datasets import load_from_disk
from trl.trainer.utils import RepeatSampler

import train_grpo
from engine.rollout import Rollout
from prompts import QUESTION_COLUMN

# Twelve questions, four a step: a pass is three steps, and the run has three passes.
SMALL = {"QUESTIONS_PER_STEP": 4, "COMPLETIONS_PER_QUESTION": 4, "MICRO_BATCH": 4, "EPOCHS": 3.0, "WARMUP_STEPS": 1}
SMALL |= {"MAX_COMPLETION_TOKENS": 32, "EVAL_QUESTIONS": 2, "EVAL_EVERY": 100, "SAVE_EVERY": 1, "SAVE_LIMIT": 9}
SMALL |= {"BF16": False, "LEARNING_RATE": 5e-4, "GRADIENT_CHECKPOINTING": False}
PASS, STEPS = 3, 9


@pytest.fixture(scope="module")
def flags(demo_base, tmp_path_factory) -> list[str]:
    """The model and the twelve questions."""
    folder = tmp_path_factory.mktemp("data")
    data = load_from_disk(demo_base / "data")
    for split, count in (("train", 12), ("test", 2)):
        data[split] = data[split].select(range(count))
    data.save_to_disk(folder)
    return ["--cpu", "--model", str(demo_base / "model"), "--dataset", str(folder)]


@pytest.fixture(scope="module")
def train(flags):
    """Runs main() in this process and returns the questions of each step that it made: train(output, "--resume")."""

    def run(output: Path, *more: str) -> list[list[str]]:
        asked, generate = [], Rollout.__call__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Rollout,
                "__call__",
                lambda self, prompts, trainer: (
                    asked.append([prompt[-1]["content"] for prompt in prompts[:: trainer.num_generations]])
                    or generate(self, prompts, trainer)
                ),
            )
            for name, value in SMALL.items():
                patch.setattr(train_grpo, name, value)
            train_grpo.main([*flags, "--output", str(output), *more])
        return asked

    return run


@pytest.fixture(scope="module")
def whole_run(train, tmp_path_factory) -> SimpleNamespace:
    """A run that nothing disturbed: its folder, with a checkpoint of every step, and the questions of every step."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return SimpleNamespace(output=output, asked=train(output))


def killed_after(step: int, whole: Path, output: Path) -> Path:
    """A folder as kill -9 leaves it when `step` steps have been saved."""
    shutil.copytree(whole, output)
    for path in [*output.glob("*.safetensors"), *output.glob("checkpoint-*")]:
        if path.is_file():
            path.unlink()
        elif int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    results = json.loads((output / "results.json").read_text())
    (output / "results.json").write_text(json.dumps({name: results[name] for name in ("before", "probe")}))
    return output


def assert_same_weights(one: Path, other: Path) -> None:
    for file in ("model.safetensors", f"checkpoint-{STEPS}/optimizer.pt", f"checkpoint-{STEPS}/scheduler.pt"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def test_each_pass_has_every_question_once_in_an_order_of_its_own(whole_run, flags):
    """Three passes of an undisturbed run hold the same twelve questions, each once, in TRL's own three orders."""
    passes = [sum(whole_run.asked[first : first + PASS], []) for first in range(0, STEPS, PASS)]
    assert len(whole_run.asked) == STEPS
    assert [len(set(asked)) for asked in passes] == [12] * 3
    questions = load_from_disk(flags[-1])["train"]
    sampler = RepeatSampler(questions, mini_repeat_count=1, batch_size=12, seed=train_grpo.SEED)
    assert passes == [[questions[i][QUESTION_COLUMN] for i in sampler] for _ in range(3)]


@pytest.mark.parametrize("step", [PASS, PASS + 1, 2 * PASS, 2 * PASS + 2])
def test_resumed_in_a_later_pass(train, whole_run, tmp_path, step):
    """At the end or in the middle of a pass: --resume asks the same questions and ends with the same bits of weights."""
    output = killed_after(step, whole_run.output, tmp_path / "run")
    assert train(output, "--resume") == whole_run.asked[step:]
    assert_same_weights(output, whole_run.output)


# Two processes: train_grpo.py with the constants above, and each process writes down what it asks.
DRIVER = """
import json, os, sys
import train_grpo
from engine import rollout
generate = rollout.Rollout.__call__
def record(self, prompts, trainer):
    with open(os.environ["ASKED"] + os.environ["RANK"], "a") as file:
        file.write(json.dumps([prompt[-1]["content"] for prompt in prompts]) + "\\n")
    return generate(self, prompts, trainer)
rollout.Rollout.__call__ = record
for name, value in json.loads(os.environ["SMALL"]).items():
    setattr(train_grpo, name, value)
train_grpo.run(train_grpo.main)
"""


def test_two_processes_resumed_in_the_middle_of_a_later_pass(flags, tmp_path):
    """Under torchrun too, where accelerate's `set_epoch` stops short of the sampler once batches are skipped."""
    (tmp_path / "driver.py").write_text(DRIVER)

    def start(output: Path, *more: str) -> list[list[list[str]]]:
        asked = tmp_path / f"asked-{output.name}-"
        environment = {"PYTHONPATH": str(ROOT), "ASKED": str(asked), "SMALL": json.dumps(SMALL | {"EPOCHS": 2.0})}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        command += [str(tmp_path / "driver.py"), *flags, "--output", str(output), *more]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return [[json.loads(line) for line in Path(f"{asked}{rank}").read_text().splitlines()] for rank in (0, 1)]

    whole = start(tmp_path / "whole")
    output = killed_after(PASS + 1, tmp_path / "whole", tmp_path / "resumed")
    assert start(output, "--resume") == [steps[PASS + 1 :] for steps in whole]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
