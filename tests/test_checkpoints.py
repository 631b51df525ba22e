"""What must not get lost: whole checkpoints, resuming, the recipe, an orderly stop, a full disk."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main
from datasets import load_from_disk

import train_grpo
from engine import checkpoints
from engine.console import UserError
from engine.curves import read_history
from engine.trainer import AtomicCheckpoints

SMALL = {"QUESTIONS_PER_STEP": 2, "MAX_COMPLETION_TOKENS": 32, "DEV_QUESTIONS": 8, "SAVE_EVERY": 1, "SAVE_LIMIT": 9}
SMALL |= {"BF16": False, "LEARNING_RATE": 5e-4, "WARMUP_STEPS": 1, "GRADIENT_CHECKPOINTING": False}


@pytest.fixture(scope="module")
def train(demo_base, tmp_path_factory):
    """Runs main() in this process on a few questions, returns its trainer: train(output, "--resume", SAVE_LIMIT=1)."""
    folder = tmp_path_factory.mktemp("data")
    data = load_from_disk(demo_base / "data")
    for split, count in (("train", 32), ("test", 8)):
        data[split] = data[split].select(range(count))
    data.save_to_disk(folder)

    common = ["--cpu", "--model", demo_base / "model", "--dataset", folder, "--max-steps", 3]

    def run(output: Path, *flags: str, **constants: object):
        return run_main(train_grpo.main, *common, "--output", output, *flags, **SMALL | constants)

    return run


@pytest.fixture(scope="module")
def whole_run(train, tmp_path_factory):
    """The folder of a run of three steps that nothing interrupted, and its trainer."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return SimpleNamespace(output=output, trainer=train(output))


@pytest.fixture
def copy(whole_run, tmp_path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(whole_run.output, tmp_path / "copy"))


def recipe_of(output: Path) -> SimpleNamespace:
    """The constants that a run was begun with, as its folder tells."""
    recorded = json.loads((output / "recipe" / "recipe.json").read_text())
    return SimpleNamespace(**{name: value for name, value in recorded.items() if name in train_grpo.default_recipe()})


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*checkpoint-*"))


# ---------------------------------------------------------------------------------------------------------- resuming
def test_interrupted_run_ends_bit_identical(train, whole_run, tmp_path, monkeypatch, capsys):
    """Ctrl-C in step 1, then --resume: the same weights to the last bit, one history, one `before`, summed time."""
    output = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def press(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # so that a second one ends the process at once

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.StopSignals, "on_step_begin", press)
        patch.setattr("sys.argv", ["train_grpo.py", "--output", "my run"])
        with pytest.raises(SystemExit) as left:
            train(output)
    assert left.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr().out
    assert (
        "stopped by SIGINT; continue checkpoint-1 with\n    python train_grpo.py --output 'my run' --resume\n" in said
    )
    assert names(output) == ["checkpoint-1"] and (output / "curves.png").exists()
    stopped = json.loads((output / "results.json").read_text())
    assert stopped["steps"] == 1 and not stopped["finished"] and "after" not in stopped

    train(output, "--resume")
    for file in ("model.safetensors", "checkpoint-3/optimizer.pt", "checkpoint-3/scheduler.pt"):
        assert (output / file).read_bytes() == (whole_run.output / file).read_bytes(), file
    whole, resumed = read_history(whole_run.output), read_history(output)
    assert [row["step"] for row in resumed] == [row["step"] for row in whole] == [0, 1, 2, 3]
    assert [row.get("reward/total") for row in resumed] == [row.get("reward/total") for row in whole]
    results = json.loads((output / "results.json").read_text())
    assert results["finished"] and results["before"] == stopped["before"]
    assert results["train_seconds"] > stopped["train_seconds"]


def test_finished_run_makes_no_further_step(train, copy):
    """A run killed after its last step resumes to save and evaluate, not to train once more."""
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    train(copy, "--resume")
    assert (copy / "model.safetensors").read_bytes() == weights
    assert json.loads((copy / "results.json").read_text())["steps"] == 3


def test_new_rhythm_on_resume(train, copy):
    """SAVE_EVERY and SAVE_LIMIT are those of today, not those that the checkpoint brings; the best one stays."""
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(copy / name)
    train(copy, "--resume", SAVE_EVERY=3, SAVE_LIMIT=1, EVAL_EVERY=2)
    state = json.loads((copy / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2 and state["save_steps"] == 3
    assert names(copy) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", "cut"),
        ("model.safetensors", "delete"),
        ("optimizer.pt", "cut"),
        ("optimizer.pt", "empty"),
        ("scheduler.pt", "delete"),
        ("rng_state.pth", "cut"),
        ("trainer_state.json", "cut"),
        ("config.json", "empty"),
    ],
)
def test_damaged_checkpoint_is_skipped(copy, capsys, file, damage):
    """Whatever is cut short, empty or gone: the checkpoint and the file are named, the one before it is taken."""
    path = copy / "checkpoint-3" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "delete":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    recipe = recipe_of(copy)
    assert checkpoints.find(copy, recipe, resume=True) == copy / "checkpoint-2"
    assert names(copy) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # looking changes nothing
    checkpoints.begin(copy, recipe, copy / "checkpoint-2")
    said = capsys.readouterr().out
    assert "checkpoint-3 skipped" in said and file.split(".")[-1] in said
    assert names(copy) == ["checkpoint-1", "checkpoint-2", "damaged-checkpoint-3"]


def test_no_complete_checkpoint(copy):
    """With nothing to resume from, each damaged one is named and none is touched."""
    for path in copy.glob("checkpoint-*"):
        (path / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="checkpoint-3 is damaged: no optimizer.pt; checkpoint-2 .*checkpoint-1"):
        checkpoints.newest_checkpoint(copy)
    assert names(copy) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    with pytest.raises(UserError, match="holds no complete checkpoint; start without --resume"):
        checkpoints.newest_checkpoint(copy / "nowhere")


class Bomb:
    """What a malicious checkpoint would hold: a pickle that runs a command when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_run_no_code(copy, tmp_path):
    """A pickle in optimizer.pt is not executed; the checkpoint counts as damaged."""
    torch.save(Bomb(tmp_path / "ran"), copy / "checkpoint-3" / "optimizer.pt")
    assert "optimizer.pt" in checkpoints.find_fault(copy / "checkpoint-3")
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_model(copy, whole_run):
    """Trainer would load what fits and train the rest from random numbers; here it is refused."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(copy / "checkpoint-3")
    config.num_hidden_layers += 1
    config.layer_types += config.layer_types[:1]
    Qwen2ForCausalLM(config).save_pretrained(copy / "checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3' was saved from another model"):
        whole_run.trainer._load_from_checkpoint(str(copy / "checkpoint-3"))
    whole_run.trainer._load_from_checkpoint(str(whole_run.output / "checkpoint-3"))


# -------------------------------------------------------------------------------------------------------- the recipe
def test_changed_recipe_is_named_and_recorded(copy, capsys):
    """Each changed constant is named with both values, and the old recipe is kept beside the new one."""
    file = copy / "recipe" / "recipe.json"
    old, recipe = json.loads(file.read_text()), recipe_of(copy)
    checkpoints.write_json(copy / "results.json", {"finished": False})
    recipe.LEARNING_RATE, recipe.MICRO_BATCH = 1e-4, 8
    checkpoint = checkpoints.find(copy, recipe, resume=True)
    assert json.loads(file.read_text()) == old and not capsys.readouterr().out  # looking changes nothing
    checkpoints.begin(copy, recipe, checkpoint)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "note: from checkpoint-3 on LEARNING_RATE is 0.0001, no longer 0.0005",
        "note: from checkpoint-3 on MICRO_BATCH is 8, no longer 4",
    ]
    assert json.loads((copy / "recipe" / "recipe-until-3.json").read_text()) == old
    assert checkpoints.changed_constants(copy, recipe) == {}


def test_resuming_under_a_changed_recipe(train, whole_run, copy):
    """The run itself goes on under the new constants, although the optimizer's own state brings the old ones."""
    shutil.rmtree(copy / "checkpoint-3")
    train(copy, "--resume", LEARNING_RATE=1e-4, WEIGHT_DECAY=0.3, ADAM_BETAS=(0.8, 0.9))
    old, new = (read_history(folder)[-1]["training/learning_rate"] for folder in (whole_run.output, copy))
    assert new == pytest.approx(old / 5) and old > 0
    groups = torch.load(copy / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    assert json.loads((copy / "recipe" / "recipe-until-2.json").read_text())["LEARNING_RATE"] == 5e-4
    assert json.loads((copy / "recipe" / "recipe.json").read_text())["LEARNING_RATE"] == 1e-4


@pytest.mark.parametrize(("name", "value"), [("MODEL", "other"), ("USE_LORA", True), ("LORA_RANK", 4)])
def test_what_the_weights_do_not_fit_is_refused(copy, name, value):
    """Under another model, or an adapter of another shape, nothing that was saved could be continued."""
    recipe = recipe_of(copy)
    setattr(recipe, name, value)
    with pytest.raises(UserError, match=f"{name} was .* and is {value!r}.*--output"):
        checkpoints.find(copy, recipe, resume=True)


def test_a_finished_run_can_be_made_longer(copy):
    """Nothing is left to resume, unless it shall now make more steps."""
    recipe = recipe_of(copy)
    checkpoints.write_json(copy / "results.json", {"finished": True, "steps": 3})
    with pytest.raises(UserError, match="is finished, nothing is left to resume"):
        checkpoints.find(copy, recipe, resume=True)
    recipe.MAX_STEPS = 5
    assert checkpoints.find(copy, recipe, resume=True) == copy / "checkpoint-3"


def test_resuming_without_curves(train, copy, capsys):
    """Who deletes runs/ loses the curves, neither the checkpoint nor the samples up to it."""
    shutil.rmtree(copy / "runs")
    file = copy / "samples.jsonl"
    samples = file.read_text(encoding="utf-8")
    file.write_text(samples + json.dumps({"step": 4, "completion": "of a step that is made again"}) + "\n")
    train(copy, "--resume", "--max-steps", "4")
    assert "is gone: the curves begin at step 3" in capsys.readouterr().out
    assert checkpoints.step_of(checkpoints.newest_checkpoint(copy)) == 4
    assert samples and file.read_text(encoding="utf-8").startswith(samples)
    assert "made again" not in file.read_text(encoding="utf-8")


def test_moved_folder_is_the_same_run(tmp_path):
    """The demo's model lies inside the output folder: moving that, or spelling it otherwise, changes no recipe."""
    recipe = SimpleNamespace(OUTPUT_DIR="output/demo", MODEL="output/demo/base/model")
    checkpoints.save_recipe(tmp_path, recipe)
    recipe.OUTPUT_DIR, recipe.MODEL = "/elsewhere/demo", "/elsewhere/demo/base/model"
    assert checkpoints.changed_constants(tmp_path, recipe) == {}
    recipe.MODEL = "/elsewhere/other/model"
    assert list(checkpoints.changed_constants(tmp_path, recipe)) == ["MODEL"]


def test_unfit_constants_exist():
    """What a resumed run refuses to see changed are constants of train_grpo.py, train_sft.py's traces, fingerprints."""
    assert checkpoints.INCOMPATIBLE.keys() <= train_grpo.default_recipe().keys() | {"TRACES", "TEST_READ", "MODEL_READ"}


# ------------------------------------------------------------------------------------------------- the output folder
def test_a_run_is_not_overwritten(copy):
    """A folder with a checkpoint, with a saved model, or with a finished run's results, is refused."""
    recipe = recipe_of(copy)
    with pytest.raises(UserError, match="already holds a run .checkpoint-1.*--resume.*--output"):
        checkpoints.find(copy, recipe, resume=False)
    for path in copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="already holds a run .model.safetensors"):
        checkpoints.find(copy, recipe, resume=False)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="already holds a run .results.json"):
        checkpoints.find(copy, recipe, resume=False)


def test_a_run_that_saved_nothing_gives_way(copy):
    """Killed before its first save, a run can be begun again; its remains go, the demo's base stays."""
    for path in [*copy.glob("checkpoint-*"), copy / "model.safetensors"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoints.write_json(copy / "results.json", {"finished": False})
    (copy / ".tmp-checkpoint-1").mkdir()
    (copy / "base").mkdir()
    before = {path.name for path in copy.iterdir()}
    assert checkpoints.find(copy, recipe_of(copy), resume=False) is None
    assert {path.name for path in copy.iterdir()} == before  # looking deletes nothing
    checkpoints.begin(copy, recipe_of(copy), None)
    left = {path.name for path in copy.iterdir()}
    assert {"base", "recipe"} <= left and not left & {"runs", "results.json", "samples.jsonl", ".tmp-checkpoint-1"}


def test_nothing_is_deleted_before_all_is_refused(train, copy):
    """A new run over the remains of one that saved nothing, with a mistake in it: the remains are all there."""
    for path in [*copy.glob("checkpoint-*"), copy / "model.safetensors"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoints.write_json(copy / "results.json", {"finished": False})
    (copy / ".lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for mistake in ({"MAX_PROMPT_TOKENS": 1}, {"MICRO_BATCH": 7}, {"LORA_MODULES": ["nonsense"], "USE_LORA": True}):
        with pytest.raises((UserError, ValueError)):
            train(copy, **mistake)
    (copy / ".lock").unlink()  # every start names its process there
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_foreign_folders_are_left_alone(tmp_path):
    """What merely has the name of something of ours is not deleted."""
    (tmp_path / "runs").mkdir()
    (tmp_path / ".tmp-mine").mkdir()
    checkpoints.begin(tmp_path, SimpleNamespace(OUTPUT_DIR=str(tmp_path)), None)
    assert (tmp_path / "runs").exists() and (tmp_path / ".tmp-mine").exists()


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
    """A file, a path through a file and a read-only place are refused in a line; nothing is created by looking."""
    recipe = SimpleNamespace()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        checkpoints.find(tmp_path / "file", recipe, resume=False)
    with pytest.raises(UserError, match="cannot be written to"):
        checkpoints.find(tmp_path / "file" / "run", recipe, resume=False)
    checkpoints.find(tmp_path / "a" / "b", recipe, resume=False)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only")))
    with pytest.raises(UserError, match="cannot be written to .Read-only"):
        checkpoints.find(tmp_path, recipe, resume=True)


# ------------------------------------------------------------------------------------------------------------- saving
def save(trainer, step: int) -> None:
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)


@pytest.fixture
def trainer(whole_run, tmp_path):
    """The trainer of the whole run, saving into a folder with checkpoint-1."""
    trainer = whole_run.trainer
    trainer.args.output_dir, trainer.args.save_total_limit = str(tmp_path), 9
    trainer.state.best_global_step = None
    save(trainer, 1)
    return trainer


def test_kill_at_any_moment_of_a_save(trainer, tmp_path):
    """kill -9 at random moments while one checkpoint is written and an old one deleted: all that is there is whole."""
    trainer.args.save_total_limit = 2
    begun = time.perf_counter()
    save(trainer, 2)
    seconds = time.perf_counter() - begun
    rng, cut_short = random.Random(0), 0
    for step in range(3, 15):
        child = os.fork()
        if child == 0:
            save(trainer, step)
            os._exit(0)
        time.sleep(rng.random() * seconds)
        os.kill(child, signal.SIGKILL)
        cut_short += os.waitpid(child, 0)[1] == signal.SIGKILL
        there = checkpoints.list_checkpoints(tmp_path)
        assert len(there) >= 2 and [checkpoints.find_fault(path) for path in there] == [None] * len(there)
    assert cut_short >= 3
    newest, recipe = checkpoints.newest_checkpoint(tmp_path), SimpleNamespace(OUTPUT_DIR=str(tmp_path))
    checkpoints.save_recipe(tmp_path, recipe)
    checkpoints.begin(tmp_path, recipe, newest)  # as --resume does
    assert newest == there[-1] and not list(tmp_path.glob(".tmp*"))


def test_disk_full_in_the_middle_of_a_save(trainer, tmp_path, capsys):
    """The weights fit, the optimizer does not: one line says so, the remains go, the older checkpoint stays whole."""
    limit = (tmp_path / "checkpoint-1" / "model.safetensors").stat().st_size + 1000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        save(trainer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().out.strip()
    assert said.startswith("WARNING: checkpoint-2 could not be saved (") and said.endswith("Training goes on")
    assert "kept: checkpoint-1." in said and len(said.splitlines()) == 1
    assert names(tmp_path) == ["checkpoint-1"] and not list(tmp_path.glob(".tmp*"))
    assert checkpoints.find_fault(tmp_path / "checkpoint-1") is None
    save(trainer, 3)  # and when there is room again
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_no_room_for_a_save(trainer, tmp_path, capsys, monkeypatch):
    """Too little free disk is noticed before anything is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    save(trainer, 2)
    assert "(0.00 GB free, 0.01 GB needed)" in capsys.readouterr().out and names(tmp_path) == ["checkpoint-1"]


def test_estimate_of_a_checkpoint(trainer, tmp_path):
    """What is asked of the disk is what a checkpoint takes, within a twentieth."""
    taken = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    assert checkpoints.checkpoint_bytes(trainer.model)[0] == pytest.approx(taken, rel=0.05)


def test_disk_is_checked_before_the_run(trainer, tmp_path, monkeypatch):
    """The line names what is free, what is needed and the constant to lower; what is saved already counts."""
    each, final = checkpoints.checkpoint_bytes(trainer.model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * each + final))
    checkpoints.check_disk(tmp_path, trainer.model, save_limit=3)
    with pytest.raises(UserError, match="GB free and .*5 checkpoints.*SAVE_LIMIT.*--output"):
        checkpoints.check_disk(tmp_path, trainer.model, save_limit=4)
    monkeypatch.undo()
    checkpoints.check_disk(tmp_path / "not" / "yet", trainer.model, save_limit=1)  # another process will make it


@pytest.mark.parametrize(
    ("limit", "best", "kept"), [(3, None, {3, 4, 5}), (3, 1, {1, 4, 5}), (1, 2, {2, 5}), (1, None, {5}), (2, 5, {4, 5})]
)
def test_rotation(trainer, tmp_path, limit, best, kept):
    """The newest and the best always stay and count towards SAVE_LIMIT."""
    for step in range(2, 5):
        save(trainer, step)
    trainer.args.save_total_limit, trainer.state.best_global_step = limit, best
    save(trainer, 5)
    assert {checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)} == kept


def test_trained_model_that_cannot_be_saved(trainer, tmp_path, monkeypatch):
    """The end of a run on a full disk: one line that sends the user to --resume, and no half a model."""
    monkeypatch.setattr(trainer, "save_model", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="could not be saved .*No space left.*--resume"):
        checkpoints.save_trained(trainer, tmp_path, max_tokens=32)
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "Modelfile").exists()


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_or_cast_weights_are_refused(sharded):
    """Before a step is made: evaluation could not gather them, or the end would find them in bf16."""
    theirs = type("Theirs", (), {"is_fsdp_enabled": False, "is_deepspeed_enabled": False, sharded: True})
    with pytest.raises(UserError, match="FSDP and DeepSpeed are not supported"):
        type("Mine", (AtomicCheckpoints, theirs), {})()


# ------------------------------------------------------------------------------------------------------------- memory
def test_out_of_memory(train, tmp_path, monkeypatch):
    """Wherever a GPU's memory runs out: one line with the constants to lower, the cheapest first."""
    full = torch.OutOfMemoryError("CUDA out of memory.")
    for place in ("engine.monitor.RunMonitor.measure_model", "engine.trainer.LeanGRPOTrainer.training_step"):
        with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
            patch.setattr(place, lambda *_, **__: (_ for _ in ()).throw(full))
            train(tmp_path / place)
        names = re.findall(r"\b[A-Z]+_[A-Z_]+\b|BETA", str(caught.value))
        assert names[:2] == ["MICRO_BATCH", "EVAL_BATCH"] and names[-1] == "USE_LORA"
        assert set(names) <= set(train_grpo.default_recipe())
