"""Faults as they happen to users: bad constants, bad model folders, kill -9, SIGTERM, two processes."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FORK, ROOT, error_line, run_script, run_two_processes
from safetensors.torch import load_file

import train_grpo
from engine import checkpoints, console, models
from engine.console import UserError

# train_grpo.py as a user starts it, but with a small step, saved after each one, and with completions that are fixed,
# so that one process and two have the same to train on: what they are depends on the question and the place only.
# FAULT="2 SIGKILL 1" sends a signal while step 2 is made: to process 1, by itself; SIGTERM goes to the launcher.
DRIVER = """
import json, os, signal, sys, time, zlib
import train_grpo
from engine import console, rollout, trainer

def generate(self, prompts, trainer):
    step, name, rank = os.environ.get("FAULT", "0 - 0").split()
    if (trainer.state.global_step + 1, os.environ.get("RANK", "0")) == (int(step), rank):
        launched = name == "SIGTERM" and "WORLD_SIZE" in os.environ
        os.kill(os.getppid() if launched else os.getpid(), getattr(signal, name))
        time.sleep(1)  # until the launcher has passed it on
    first = int(os.environ.get("RANK", 0)) * len(prompts)
    encode = lambda text: trainer.processing_class(text, add_special_tokens=False)["input_ids"]
    prompt_ids = trainer.processing_class.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    completions = []
    for i, prompt in enumerate(prompts, first):
        number = zlib.crc32(prompt[-1]["content"].encode()) % 50 + i % trainer.num_generations
        tags = ("<think>", "</think>") if number % 3 else ("", "")
        completions.append(encode(f"{tags[0]}\\n{number}\\n{tags[1]}\\n<answer>\\n{number}\\n</answer><|im_end|>"))
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

def record(self, folder, write=trainer.LeanGRPOTrainer._write):
    write(self, folder)
    if self.args.should_save:
        logs = {name: list(self._logs[name]) for name in ("prompt", "completion", "advantages")}
        logs["rewards"] = {name: list(values) for name, values in self._logs["rewards"].items()}
        (folder / "logs.json").write_text(json.dumps(logs))

def main(argv=None):
    rollout.Rollout.__call__, trainer.LeanGRPOTrainer._write = generate, record
    small = {"QUESTIONS_PER_STEP": 4, "MICRO_BATCH": 8, "SAVE_EVERY": 1, "SAVE_LIMIT": 9}
    small["REWARD_WEIGHTS"] = [1.0, 1.0, 1.0, 1.0, 3.0, 0.0]
    train_grpo.main(argv, **small, EVAL_EVERY=100, DEV_QUESTIONS=8)

if __name__ == "__main__":
    try:
        console.run(main)
    finally:
        print(f"rank {os.environ.get('RANK', 0)} ends", flush=True)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "train_grpo_small.py"
    path.write_text(DRIVER)
    return path


@pytest.fixture
def start():
    """Starts a run in a process of its own, which writes what it says to OUTPUT/log: start(command, output, flags).

    The environment may have a FAULT."""
    running = []

    def begin(command: list, output: Path, *flags: object, **environment: str) -> subprocess.Popen:
        arguments = [*command, "--demo", "--cpu", "--output", output, *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        with open(output / "log", "w") as log:
            running.append(subprocess.Popen(list(map(str, arguments)), env=environment, stdout=log, stderr=log))
        return running[-1]

    yield begin
    for process in running:  # those that a failed test has left; torchrun ends its own children on SIGTERM
        process.terminate()
        process.wait(60)


def run_fork(driver: Path, *flags: object) -> int:
    """Run DRIVER in a fork of this process; its exit code."""
    spec = importlib.util.spec_from_file_location("driver", driver)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    process = FORK.Process(target=module.main, args=(["--demo", "--cpu", *map(str, flags)],))
    process.start()
    process.join()
    return process.exitcode


# -------------------------------------------------------------------------------------------------- bad constants
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEARNING_RATE", "1e-6"),
        ("LEARNING_RATE", float("nan")),
        ("LEARNING_RATE", 0),
        ("LEARNING_RATE", True),
        ("MICRO_BATCH", -1),
        ("MICRO_BATCH", 8.0),
        ("QUESTIONS_PER_STEP", -1),
        ("COMPLETIONS_PER_QUESTION", 1),
        ("MAX_STEPS", 0),
        ("SEED", 2**32),
        ("ADAM_BETAS", 0.9),
        ("ADAM_BETAS", (0.9, 1.0)),
        ("ADAM_BETAS", (0.9, 0.9, 0.9)),
        ("TEMPERATURE", float("inf")),
        ("BETA", -0.1),
        ("LORA_DROPOUT", 1),
        ("USE_LORA", "False"),
        ("LORA_MODULES", "q_proj"),
        ("LORA_MODULES", [""]),
        ("LOSS_TYPE", "ppo"),
        ("SCALE_REWARDS", None),
        ("MODEL", ""),
        ("REWARD_WEIGHTS", [1, "2"]),
        ("REWARD_WEIGHTS", [1.0] * 5),
        ("REWARD_WEIGHTS", [1.0] * 5 + [-1.0]),
        ("REWARD_WEIGHTS", [1.0, 1.0, 1.0, 1.0, 3.0, 0.9]),  # of 8.9
        ("SAVE_LIMIT", 0),
    ],
)
def test_constant_of_a_wrong_kind(tmp_path, name, value):
    """A constant of a wrong type or out of range is named with its value and what it may be, before anything loads."""
    file = "rewards.py" if name == "REWARD_WEIGHTS" else "train_grpo.py"
    flag = ", or by --" if name in ("MODEL", "SEED", "MAX_STEPS") else "$"
    with pytest.raises(UserError, match=f"^{name} = {re.escape(repr(value))} is not .*; mend it in {file}{flag}"):
        train_grpo.main(["--cpu", "--output", str(tmp_path)], **{name: value})


@pytest.mark.parametrize(
    ("script", "line", "retyped"),
    [
        ("train_grpo.py", "USE_LORA: bool = False", "USE_LORA = True"),
        ("train_sft.py", "MICRO_BATCH: int = 0", "MICRO_BATCH = 4"),
    ],
)
def test_constant_without_its_type(tmp_path, script, line, retyped):
    """A line retyped as the README's tables show it would no longer be a constant, and change nothing in silence."""
    text = (ROOT / script).read_text(encoding="utf-8")
    assert line in text
    (tmp_path / script).write_text(text.replace(line, retyped), encoding="utf-8")
    flags = ["--cpu", "--output", tmp_path / "run", *["--traces", "none"] * (script == "train_sft.py")]
    done = run_script(tmp_path / script, *flags, expect=2, PYTHONPATH=str(ROOT))
    assert f"{retyped} in {script} has no type" in error_line(done)


def test_real_constants_are_right():
    """The recipe itself, and the demo's, pass."""
    for flags in ([], ["--demo"]):
        _, recipe = train_grpo.configure(flags, {})
    train_grpo.configure([], {"REWARD_WEIGHTS": [*recipe.REWARD_WEIGHTS[:5], 0.2]})  # less than a tenth


def test_error_as_the_user_sees_it(tmp_path):
    """One line on stderr and exit code 2; the empty folder stays unmade."""
    line = error_line(
        run_script("train_grpo.py", "--demo", "--cpu", "--output", tmp_path / "new", "--resume", expect=2)
    )
    assert "holds no complete checkpoint; start without --resume" in line and not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------- bad model folders
def edit(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def other_tokenizer(folder: Path) -> None:
    """A tokenizer with more tokens than the model has rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(1000)])
    tokenizer.save_pretrained(folder)


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


MODEL_FAULTS = {
    "no file named model.safetensors": lambda m: (m / "model.safetensors").unlink(),
    "No file named model.safetensors": lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
    "incomplete metadata": cut_weights,
    "are missing or of another shape": lambda m: edit(m / "config.json", intermediate_size=64),
    "it has no end token": lambda m: edit(m / "tokenizer_config.json", eos_token=None),
    "not this model's: its ids go up to": other_tokenizer,
    "not this model's: the model ends with token 77777": lambda m: edit(
        m / "generation_config.json", eos_token_id=77777
    ),
    "custom code": lambda m: edit(m / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
    "not a valid JSON": lambda m: (m / "config.json").write_text("{"),
}


@pytest.mark.parametrize("words", MODEL_FAULTS)
def test_faulty_model_folder(demo_base, tmp_path, words):
    """Weights missing, cut, pickled or of another shape, a foreign tokenizer, remote code: refused with the folder."""
    model = Path(shutil.copytree(demo_base / "model", tmp_path / "model"))
    MODEL_FAULTS[words](model)
    with pytest.raises(UserError, match=f"(?i){words}") as error:
        models.load_model(str(model))
    assert str(model) in str(error.value)


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_padding_with_the_end_token(demo_base, tmp_path, capsys, pad):
    """Padding that looks like an end, or none at all, is said and mended with another special token."""
    model = Path(shutil.copytree(demo_base / "model", tmp_path / "model"))
    edit(model / "tokenizer_config.json", pad_token=pad)
    _, tokenizer = models.load_model(str(model))
    assert tokenizer.pad_token == "<|endoftext|>" != tokenizer.eos_token
    assert f"pads with {pad}; here <|endoftext|> does" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- real processes
def test_kill_9_then_sigterm_then_the_end(start, demo_output, driver):
    """kill -9 after a save, --resume, SIGTERM in a step, --resume: it ends as if nothing had happened."""
    command, flags = [sys.executable, driver], ["--max-steps", 3]
    assert start(command, demo_output, *flags, FAULT="2 SIGKILL 0").wait(300) == -signal.SIGKILL
    assert json.loads((demo_output / "results.json").read_text())["finished"] is False
    code = start(command, demo_output, *flags, "--resume", FAULT="2 SIGTERM 0").wait(300)
    said = (demo_output / "log").read_text()
    assert code == 143 and "--max-steps 3 --resume\n" in said and "Traceback" not in said, said
    assert run_fork(driver, *flags, "--output", demo_output, "--resume") == 0
    results = json.loads((demo_output / "results.json").read_text())
    assert results["finished"] and results["steps"] == 3
    assert [checkpoints.find_fault(path) for path in sorted(demo_output.glob("checkpoint-*"))] == [None] * 3
    steps = [json.loads(line)["step"] for line in (demo_output / "samples.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_two_processes_train_like_one(start, demo_output, driver, tmp_path):
    """torchrun with two processes, one killed, both stopped, both brought to the end: at every step the completions,
    rewards and advantages of one process that nothing stopped, and in the end, but for rounding, its weights.

    kill -9 of one process ends the other with a message, no hang. On SIGTERM for the launcher both finish the step, the
    main one saves and says how to go on. The second one stays until the first is done: gone earlier, it could abort
    (`end_together`).
    """
    one, flags = Path(shutil.copytree(demo_output, tmp_path / "one")), ["--max-steps", 3]
    assert start([*TORCHRUN, driver], demo_output, *flags, FAULT="2 SIGKILL 1").wait(300) != 0
    assert "SIGKILL" in (demo_output / "log").read_text()

    assert start([*TORCHRUN, driver], demo_output, *flags, "--resume", FAULT="2 SIGTERM 0").wait(300) != 0
    said = (demo_output / "log").read_text()
    assert said.count("stopped by SIGTERM; continue checkpoint-2 with") == 1 and "(the same launcher)" in said
    assert "Traceback" not in said.split("stopped by")[0] and "SIGABRT" not in said
    assert said.index("rank 1 ends") > said.index("stopped by SIGTERM")

    assert start([*TORCHRUN, driver], demo_output, *flags, "--resume").wait(300) == 0, (demo_output / "log").read_text()
    said = (demo_output / "log").read_text()
    assert "device     2 x CPU" in said and said.count("step 3/3") == 1
    assert said.index("rank 1 ends") > said.index("after  ")

    assert run_fork(driver, *flags, "--output", one) == 0
    for step in (1, 2, 3):
        theirs, its = (
            json.loads((folder / f"checkpoint-{step}" / "logs.json").read_text()) for folder in (demo_output, one)
        )
        assert len(theirs["completion"]) == 4 * train_grpo.COMPLETIONS_PER_QUESTION
        assert [theirs[name] for name in ("prompt", "completion")] == [its[name] for name in ("prompt", "completion")]
        assert theirs["rewards"] == its["rewards"]
        assert theirs["advantages"] == pytest.approx(its["advantages"], abs=1e-5)
        assert any(theirs["advantages"])
    names = {path.name for path in (demo_output / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names
    ours, others = load_file(demo_output / "model.safetensors"), load_file(one / "model.safetensors")
    base = load_file(one / "base" / "model" / "model.safetensors")
    moved = max((others[name] - base[name]).abs().max().item() for name in base)
    for name, weight in others.items():  # Adam's first steps turn the sign of a rounding error into a whole step
        assert (ours[name] - weight).abs().mean() < moved / 100, name
    assert torch.isfinite(torch.tensor(moved)) and moved > 0


def test_users_error_in_two_processes(demo_output, capfd):
    """Both end with exit code 2, and only the first one of the machine says why."""
    (demo_output / "checkpoint-1").mkdir()

    def main() -> None:
        console.run(lambda: train_grpo.main(["--demo", "--cpu", "--output", str(demo_output)], MICRO_BATCH=8))

    assert run_two_processes(main) == [2, 2]
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "already holds a run" in said
