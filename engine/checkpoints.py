"""What a run must not lose: its checkpoints, recipe, results and trained model; and how it stops in good order.

A checkpoint is written to `.tmp-checkpoint-N`, synced to the disk and renamed, so `checkpoint-N` is either complete or
not there. A kill -9 or a power cut at any moment costs the steps since the last save and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals

import prompts
from engine.console import UserError, first_line, note
from engine.folder import check_writable, existing, lock, sync, write_text
from engine.model_card import modelfile

# A new run is refused in a folder that holds one of these. `base/` (the demo's cache) does not count.
PROTECTED = ["checkpoint-*", "*.safetensors", "adapter"]
# A run writes these before its first save. A new run may replace them.
REPLACEABLE = ["results.json", "samples.jsonl", "runs", "curves.png", "recipe"]
# A killed run may leave these behind.
LEFTOVERS = [".tmp-checkpoint-*", ".tmp-old-checkpoint-*", ".tmp-model", ".tmp-*.json*", ".tmp-README.md"]
# What must not change when a run is resumed, and why. All other constants and inputs may change.
UNFIT = "the weights saved in {!r} do not fit that; change it back"
INCOMPATIBLE = dict.fromkeys(["MODEL", "USE_LORA", "LORA_RANK", "LORA_ALPHA", "LORA_MODULES"], UNFIT) | {
    "TRACES": UNFIT,  # a constant of train_sft.py only: neither script continues a run of the other
    "TEST_READ": "`before` in {!r} was measured on other questions; put the old test split back",
    "MODEL_READ": "the adapter saved in {!r} belongs to the old weights; put them back into MODEL's folder",
}


# -------------------------------------------------------------------------------------- the output folder, before
def find(output: Path, recipe: SimpleNamespace, resume: bool) -> Path | None:
    """The checkpoint that a run in `output` continues, or None for a new run. Changes nothing on the disk.

    Raises UserError if `output` cannot be written to; if it holds a run and this is a new one; or if the run in it
    cannot be resumed: no complete checkpoint, a constant that the saved weights do not fit, nothing left to do.
    """
    check_writable(output)
    results = read_results(output)
    held = [path.name for pattern in PROTECTED for path in sorted(output.glob(pattern))]
    held += ["results.json"] if results.get("finished") else []
    if not resume:
        if held:
            remedy = "continue it with --resume, or name another folder with --output"
            raise UserError(f"{str(output)!r} already holds a run ({held[0]}), which is never overwritten; {remedy}")
        return None
    checkpoint = newest_checkpoint(output)
    longer = {"MAX_STEPS", "EPOCHS"} & refuse_incompatible(output, recipe).keys()
    at_the_end = results.get("finished") and results.get("steps") == step_of(checkpoint)
    if at_the_end and any(output.glob("*.safetensors")) and not longer:
        raise UserError(f"the run in {str(output)!r} is finished, nothing is left to resume; name another --output")
    return checkpoint


def refuse_incompatible(output: Path, recipe: SimpleNamespace) -> dict[str, tuple]:
    """The changed constants, as in `changed_constants`. Raises UserError if the run in `output` cannot go on with them.

    This is asked before the inputs are read, and again when their fingerprints are known.
    """
    changes = changed_constants(output, recipe)
    for name, (before, now) in changes.items():
        # without an adapter the checkpoint holds all weights, and MODEL's are not needed
        if name in INCOMPATIBLE and (name != "MODEL_READ" or recipe.USE_LORA):
            why = INCOMPATIBLE[name].format(str(output))
            raise UserError(f"{name} was {before!r} and is {now!r}: {why}, or start another run with --output")
    return changes


def begin(output: Path, recipe: SimpleNamespace, checkpoint: Path | None) -> dict:
    """Make `output` ready for a run that nothing can refuse any more; returns what a resumed run has measured so far.

    Deletes what a killed run left incomplete. A new run also deletes what a run without any checkpoint left there. A
    resumed run renames newer, damaged checkpoints, and names and records changed constants.
    """
    lock(output)
    if checkpoint is None:
        find(output, recipe, resume=False)  # again: a folder that did not exist at the first look was not locked
    for pattern in LEFTOVERS:
        _delete(output.glob(pattern))
    if checkpoint is None:
        if (output / "recipe" / "recipe.json").exists():  # without it, files of these names are not a run's
            _delete(output / name for name in REPLACEABLE)
        save_recipe(output, recipe)
        return {}
    for damaged in (path for path in list_checkpoints(output) if step_of(path) > step_of(checkpoint)):
        aside = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(aside, ignore_errors=True)
        note(f"{damaged.name} skipped, it is damaged ({find_fault(damaged)}); it is now {aside.name}")
        damaged.rename(aside)
    changes = changed_constants(output, recipe)
    for name, (before, now) in changes.items():
        note(f"from {checkpoint.name} on {name} is {now!r}, no longer {before!r}")
    if changes:
        old = output / "recipe" / f"recipe-until-{step_of(checkpoint)}.json"
        if not old.exists():
            shutil.copy(output / "recipe" / "recipe.json", old)
        save_recipe(output, recipe)
    results = read_results(output)
    results.pop("finished", None)  # it is added last, and so printed last
    return results


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def newest_checkpoint(output: Path) -> Path:
    """The newest complete checkpoint. Raises UserError if there is none, naming each damaged one."""
    damaged = []
    for path in reversed(list_checkpoints(output)):
        if (fault := find_fault(path)) is None:
            return path
        damaged.append(f"{path.name} is damaged: {fault}")
    remedy = f" ({'; '.join(damaged)}); start a new run in another --output" if damaged else "; start without --resume"
    raise UserError(f"--resume: {str(output)!r} holds no complete checkpoint{remedy}")


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = (path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(filter(Path.is_dir, found), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_fault(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be resumed from; None if it is complete. Fast, because no tensor is read."""
    for pattern in ("trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state*.pth", "*.safetensors"):
        if not any(checkpoint.glob(pattern)):
            return f"no {pattern}"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_text(encoding="utf-8"))
                if file.name == "trainer_state.json" and content["global_step"] != step_of(checkpoint):
                    return f"trainer_state.json is of step {content['global_step']}"
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # compares the header with the file's length
                    pass
            elif file.suffix in (".pt", ".pth"):
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # each reader raises errors of its own, and any of them means damage
            return f"{file.name}: {first_line(error)}"
    return None


def checkpoint_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """The sizes of a checkpoint (weights, and two Adam moments of the trainable ones) and of the saved model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    saved = trainable if trainable < weights else weights  # the checkpoint of an adapter holds the adapter only
    return saved + 2 * trainable, weights


def check_disk(output: Path, model: torch.nn.Module, save_limit: int) -> None:
    """Raises UserError if the disk of `output` has no room for what a run still has to save.

    While the oldest checkpoint is replaced there is one more than `save_limit` (with a limit of 1 the best and the
    newest stay). The model that is saved at the end comes on top.
    """
    each, final = checkpoint_bytes(model)
    count = max(save_limit, 2) + 1
    needed = each * max(count - len(list_checkpoints(output)), 1) + final
    free = shutil.disk_usage(existing(output)).free  # the main process may not have made the folder yet
    if free < needed:
        raise UserError(
            f"{str(output)!r} has {free / 1e9:.1f} GB free and this run needs {needed / 1e9:.1f} GB more for "
            f"{count} checkpoints and the model; free some, lower SAVE_LIMIT, or name another --output"
        )


# ---------------------------------------------------------------------------------------------- recipe and results
def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path, key: str) -> dict:
    """Read a file that a run wrote and that has `key` in it. Raises UserError if it is damaged or not a run's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {str(path)!r}: {first_line(error)}; name another --output") from error
    if not (isinstance(content, dict) and key in content):
        raise UserError(f"{str(path)!r} is no file of a run, it has no {key!r}; move it away, or name another --output")
    return content


def read_results(output: Path) -> dict:
    """results.json of an earlier start of this run; {} if there is none. Raises UserError if no run wrote it."""
    return _read_json(output / "results.json", "finished") if (output / "results.json").is_file() else {}


def describe_recipe(recipe: SimpleNamespace) -> dict:
    """All that makes an experiment: the constants, what is asked from prompts.py, and the versions, as plain JSON."""
    names = ("OPEN_SYSTEM_PROMPT", "QUESTION_COLUMN", "ANSWER_COLUMN")
    asked = {name: getattr(prompts, name) for name in names}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "datasets", "peft")}
    everything = vars(recipe) | asked | {"versions": versions}
    return json.loads(json.dumps(everything, default=lambda reward: reward.__name__))


def save_recipe(output: Path, recipe: SimpleNamespace) -> None:
    """Write `output/recipe/`: recipe.json, and copies of the scripts."""
    folder = output / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    project = Path(__file__).parent.parent
    for script in [*project.glob("*.py"), *project.glob("engine/*.py")]:
        copy = folder / script.relative_to(project)
        copy.parent.mkdir(exist_ok=True)
        copy.unlink(missing_ok=True)  # the copy, like the script, may be read-only
        shutil.copyfile(script, copy)
    write_json(folder / "recipe.json", describe_recipe(recipe))


def changed_constants(output: Path, recipe: SimpleNamespace) -> dict[str, tuple]:
    """What differs from the recipe that `output` was begun with: name -> (before, now).

    A fingerprint (..._READ) differs only where both are known: they are not known before the inputs are read.
    """
    before, now = _read_json(output / "recipe" / "recipe.json", "OUTPUT_DIR"), describe_recipe(recipe)
    old, new = before["OUTPUT_DIR"] + os.sep, now["OUTPUT_DIR"] + os.sep
    for name, value in before.items():
        if isinstance(value, str) and value.startswith(old):  # the demo's own model, in a folder that was moved
            before[name] = new + value.removeprefix(old)
    changes = {}
    for name in sorted((before.keys() | now.keys()) - {"OUTPUT_DIR"}):
        values = before.get(name), now.get(name)
        if values[0] != values[1] and not (name.endswith("_READ") and None in values):
            changes[name] = values
    return changes


# --------------------------------------------------------------------------------------------------------- saving
def save_trained(trainer: Trainer, output: Path, max_tokens: int) -> None:
    """Save the trained model at the root of `output`; for LoRA the merged model there and the adapter in `adapter/`.

    The Modelfile makes Ollama ask it as it was evaluated: under the prompt of its training, greedily, with at most
    `max_tokens` tokens. Raises UserError if it cannot be written; the last checkpoint still holds it.
    """
    temporary, lora = output / ".tmp-model", isinstance(trainer.model, PeftModel)
    model = trainer.model.get_base_model() if lora else trainer.model
    model.config.use_cache = True  # the trainer has switched it off
    # merged into rounded weights, small updates would be lost
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
    try:
        trainer.save_model(str(temporary / "adapter" if lora else temporary))
        if not trainer.args.should_save:
            return
        if lora:
            model.generation_config.save_pretrained(temporary / "adapter")
            trainer.model.merge_and_unload().save_pretrained(temporary)
            trainer.processing_class.save_pretrained(temporary)
        (temporary / "Modelfile").write_text(modelfile(trainer.processing_class, max_tokens), encoding="utf-8")
        open_weights(temporary, temporary / "Modelfile")
        _sync_all(temporary)
        for path in temporary.iterdir():
            if path.is_dir():  # os.replace does not replace a folder that has files
                _delete([output / path.name])
            os.replace(path, output / path.name)
        temporary.rmdir()
        sync(output)
    except Exception as error:  # as in failure_of
        shutil.rmtree(temporary, ignore_errors=True)
        fault = first_line(error)
        raise UserError(f"the trained model could not be saved ({fault}); mend that and --resume") from error


def limit_answers(model: PreTrainedModel, max_tokens: int) -> None:
    """Make greedy decoding with at most `max_tokens` tokens the default of the saved model, as it is evaluated here."""
    ends = {name: getattr(model.generation_config, name) for name in ("eos_token_id", "pad_token_id")}
    # do_sample is said, because `pipeline` samples otherwise
    model.generation_config = GenerationConfig(**ends, max_new_tokens=max_tokens, do_sample=False)


def open_weights(folder: Path, like: Path) -> None:
    """Give the weights in `folder` the mode of the file `like`: safetensors (issue #782) lets only the owner read."""
    for weights in folder.rglob("*.safetensors"):
        shutil.copymode(like, weights)


def failure_of(work: Callable[..., None], *args) -> str | None:
    """Why `work` failed; None if it did not."""
    try:
        work(*args)
    except Exception as error:  # torch, safetensors, tokenizers and Python each have their own error for a full disk
        return first_line(error)
    return None


def _sync_all(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def publish(temporary: Path, final: Path) -> None:
    """Rename a checkpoint from `temporary` to `final` when all of it is on the disk.

    A complete checkpoint of the same step is kept: it holds the same, and replacing it would take two renames, between
    which a kill would leave no checkpoint of this step.
    """
    _sync_all(temporary)
    if final.exists() and find_fault(final) is None:
        _delete([temporary])
        return
    _delete([final])
    temporary.rename(final)
    sync(final.parent)


def rotate(output: Path, limit: int, best_step: int | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but never the newest one or the best one.

    transformers' rotate_checkpoints deletes the same ones, but in place: a kill half-way leaves a damaged checkpoint.
    """
    steps = [step_of(path) for path in list_checkpoints(output)]
    others = [step for step in steps[:-1] if step != best_step]
    for step in others[: max(len(steps) - limit, 0)]:
        with suppress(OSError):  # it stays, and the next save tries again
            doomed = output / f".tmp-old-checkpoint-{step}"
            (output / f"checkpoint-{step}").rename(doomed)
            shutil.rmtree(doomed)


# ------------------------------------------------------------------------------------------------------- stopping
class StopSignals(TrainerCallback):
    """Within `with StopSignals(trainer) as stop:` Ctrl-C, SIGTERM and SIGHUP end the training after a step and a save.

    The handler only notes the signal; all processes compare what they noted at the end of each step. A second signal
    ends the process at once. The exception is SIGHUP, which a closing terminal's shell and the kernel both send.
    `stop.signal` is the signal that ended the training, or 0.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.signal, self.trainer = 0, trainer
        trainer.add_callback(self)

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has set SIG_IGN
            numbers.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL if number in (signal.SIGINT, signal.SIGTERM) else signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal may have closed
                os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be in use right now

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.signal = max(gather_object([self.signal]))
        if self.signal:
            control.should_log = True  # before the save: the history of a resumed run then has no gap
            control.should_save = control.should_training_stop = True

    def leave(self, output: Path, results: dict) -> None:
        """Write the results so far, say how to go on, and end the program with the exit code of the signal."""
        if self.trainer.is_world_process_zero():
            write_json(output / "results.json", results | {"finished": False})
            words = [word for word in sys.argv if word != "--resume"]
            launcher = "python" if os.environ.get("WORLD_SIZE", "1") == "1" else "(the same launcher)"
            command = os.environ.get("GO_ON_WITH") or f"{launcher} {shlex.join(words)} --resume"  # train_r1.py sets it
            saved = list_checkpoints(output)
            how = f"continue {saved[-1].name} with\n    {command}" if saved else "not saved"
            print(f"stopped by {signal.Signals(self.signal).name}; {how}", flush=True)
        end_together(self.trainer)
        sys.exit(128 + self.signal)


def end_together(trainer: Trainer) -> None:
    """Let all processes of a run wait for the main one and leave their group in order.

    A process that ended at once could do so while a thread of gloo still holds tensors of its last gather. Freeing them
    then aborts the process, and the launcher kills the others.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.destroy_process_group()
