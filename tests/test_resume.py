"""A resumed run asks what an undisturbed one asks, in whatever pass it was stopped; and the memory of a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import check_gpu
import pytest
import torch
from conftest import FORM_PAID, ROOT, conversation_about
from datasets import Dataset, load_from_disk
from test_rollout import MIXED, FakeCuda, make_model, make_tokenizer, replayed
from transformers import AutoTokenizer
from trl.trainer.utils import RepeatSampler

import train_grpo
from engine import models, rollout
from engine.rollout import Rollout, Sampler
from engine.templates import encode
from prompts import QUESTION_COLUMN

# Twelve questions to train on, four a step: a pass is three steps, and the run has three passes.
SMALL = {"QUESTIONS_PER_STEP": 4, "COMPLETIONS_PER_QUESTION": 4, "MICRO_BATCH": 4, "EPOCHS": 3.0, "WARMUP_STEPS": 1}
SMALL |= {"MAX_COMPLETION_TOKENS": 32, "DEV_QUESTIONS": 2, "EVAL_EVERY": 100, "SAVE_EVERY": 1, "SAVE_LIMIT": 9}
SMALL |= {"BF16": False, "LEARNING_RATE": 5e-4, "GRADIENT_CHECKPOINTING": False, "REWARD_WEIGHTS": FORM_PAID}
PASS, STEPS = 3, 9


@pytest.fixture(scope="module")
def flags(demo_base, tmp_path_factory) -> list[str]:
    """The model and the twelve questions."""
    folder = tmp_path_factory.mktemp("data")
    data = load_from_disk(demo_base / "data")
    for split, count in (("train", 14), ("test", 2)):
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
            train_grpo.main([*flags, "--output", str(output), *more], **SMALL)
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
    (output / "results.json").write_text(
        json.dumps({name: results[name] for name in ("before", "probe")} | {"finished": False})
    )
    return output


def assert_same_weights(one: Path, other: Path) -> None:
    for file in ("model.safetensors", f"checkpoint-{STEPS}/optimizer.pt", f"checkpoint-{STEPS}/scheduler.pt"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def test_each_pass_has_every_question_once_in_an_order_of_its_own(whole_run, flags):
    """Three passes of an undisturbed run hold the same twelve questions, each once, in TRL's own three orders."""
    passes = [sum(whole_run.asked[first : first + PASS], []) for first in range(0, STEPS, PASS)]
    assert len(whole_run.asked) == STEPS
    assert [len(set(asked)) for asked in passes] == [12] * 3
    questions = load_from_disk(flags[-1])["train"].select(range(12))  # the last two are for development
    sampler = RepeatSampler(questions, mini_repeat_count=1, batch_size=12, seed=train_grpo.SEED)
    assert passes == [[questions[i][QUESTION_COLUMN] for i in sampler] for _ in range(3)]


@pytest.mark.parametrize("step", [PASS, PASS + 1, 2 * PASS, 2 * PASS + 2])
def test_resumed_in_a_later_pass(train, whole_run, tmp_path, step):
    """At the end or in the middle of a pass, --resume asks the same and ends with the same weights, bit by bit."""
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
train_grpo.run(lambda: train_grpo.main(**json.loads(os.environ["SMALL"])))
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


# ------------------------------------------------------------------------------------------------- memory of a GPU
def test_room_is_made_only_beside_training(monkeypatch):
    """On a full card the captured batch goes where something trains, and stays where nothing does (evaluate.py ...)."""
    monkeypatch.setattr(rollout, "_free_share", lambda device: 0.1)
    for beside_training in (True, False):
        sampler = replayed(Sampler(make_model().eval(), make_tokenizer()))
        sampler.beside_training = beside_training
        sampler.generate(MIXED, 10)
        assert (sampler.batch is None) == beside_training == (not sampler.graphs)


def test_free_share(monkeypatch):
    """Of 24 GB: 10 that nobody holds, and 3 that PyTorch holds unused."""
    gb = {"mem_get_info": (10, 24), "memory_reserved": 14, "memory_allocated": 11}
    for name, value in gb.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert rollout._free_share(torch.device("cuda", 0)) == 13 / 24


@pytest.mark.parametrize("error", [RuntimeError("not permitted when stream is capturing"), torch.OutOfMemoryError()])
def test_failed_capture_gives_its_pool_back(monkeypatch, error):
    """The allocator's pool is ended and released, or it would believe in a capture for ever and keep its cache."""
    called = []
    FakeCuda(monkeypatch, error)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *arguments, name=name: called.append((name, *arguments)))
    sampler = Sampler(make_model(), make_tokenizer())
    sampler._replays = lambda: sampler.use_graph
    try:
        sampler.generate(MIXED, 10)
    except torch.OutOfMemoryError:
        assert isinstance(error, torch.OutOfMemoryError)
    assert called == [("_cuda_endAllocateToPool", None, (0, 1)), ("_cuda_releasePool", None, (0, 1))]


# -------------------------------------------------------------------------------------------------------- the start
def test_prompts_are_measured_in_one_call():
    """All prompts go to the tokenizer at once, and the same questions are kept as one by one."""

    class Letters:
        """A tokenizer of one token per character, which counts its calls."""

        calls = 0

        def apply_chat_template(self, conversations, **_):
            self.calls += 1
            return {"input_ids": [list(messages[-1]["content"]) for messages in conversations]}

    prompts = [[{"role": "user", "content": "x" * length}] for length in (5, 257, 256, 9)]
    letters = Letters()
    kept = models.drop_long(Dataset.from_dict({"prompt": prompts, "answer": [0, 1, 2, 3]}), letters, 256, 3)
    assert kept["answer"][:] == [0, 2, 3] and letters.calls == 1


# ------------------------------------------------------------------------------------------------ studies/check_gpu.py
def test_check_gpu_asks_the_longest_prompts(demo_base):
    """Its questions differ, and nearly all prompts are as long as MAX_PROMPT_TOKENS allows, none too long by much."""
    tokenizer, limit = AutoTokenizer.from_pretrained(demo_base / "model"), train_grpo.MAX_PROMPT_TOKENS
    texts = check_gpu.longest_questions(tokenizer, limit)
    lengths = [len(ids) for ids in encode(tokenizer, [conversation_about(text) for text in texts])]
    assert len(set(texts)) == 400 and limit in lengths and min(lengths) > limit - 20
    steps = check_gpu.STEPS * train_grpo.QUESTIONS_PER_STEP
    assert sum(length <= limit for length in lengths[:384]) >= steps
