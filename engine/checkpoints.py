"""What must not get lost: the checkpoints, recipe and results of a run, and an orderly stop.

A checkpoint is written to `.tmp-checkpoint-N`, synced to the disk and renamed, so that `checkpoint-N` is whole or not
there: kill -9 or a power cut at any moment costs the steps since the last save, nothing else.
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

# What a run leaves behind that nobody wants overwritten. `base/` (the demo's cache) does not count.
PROTECTED = ["checkpoint-*", "*.safetensors", "adapter"]
# What a run writes before its first save, and may be begun again.
REPLACEABLE = ["results.json", "samples.jsonl", "runs", "curves.png", "recipe"]
# What a killed run was about to write, or to delete.
LEFTOVERS = [".tmp-checkpoint-*", ".tmp-old-checkpoint-*", ".tmp-model", ".tmp-*.json*", ".tmp-README.md"]
# Constants that make what the weights are: a checkpoint fits no others. All else may change when a run is resumed.
# TRACES is train_sft.py's: neither script goes on with what the other has begun.
INCOMPATIBLE = {"MODEL", "TRACES", "USE_LORA", "LORA_RANK", "LORA_ALPHA", "LORA_MODULES"}
# And inputs that must not change, by their fingerprints, though they keep their names
INCOMPATIBLE_INPUTS = {
    "TEST_READ": "`before` in {!r} was measured on other questions; put the old test split back",
    "MODEL_READ": "the adapter saved in {!r} belongs to the old weights; put them back into MODEL's folder",
}


# -------------------------------------------------------------------------------------- the output folder, before
def find(output: Path, recipe: SimpleNamespace, resume: bool) -> Path | None:
    """The checkpoint that a run in `output` continues, None for a new run. Only looks: `begin` then changes things.

    Raises:
        UserError: a new run where something trained lies already; nothing complete to resume, or nothing left to do;
            a recipe whose model the saved weights do not fit; no folder that can be written to.
    """
    check_writable(output)
    results = read_results(output)
    held = [path.name for pattern in PROTECTED for path in sorted(output.glob(pattern))]
    if results.get("finished"):
        held.append("results.json")
    if not resume:
        if held:
            raise UserError(
                f"{str(output)!r} already holds a run ({held[0]}), which is never overwritten; "
                "continue it with --resume, or name another folder with --output"
            )
        return None
    checkpoint = newest_checkpoint(output)
    changes = refuse_incompatible(output, recipe)
    done = results.get("finished") and results.get("steps") == step_of(checkpoint) and any(output.glob("*.safetensors"))
    if done and not {"MAX_STEPS", "EPOCHS"} & changes.keys():
        raise UserError(
            f"the run in {str(output)!r} is finished, nothing is left to resume; start another with --output"
        )
    return checkpoint


def refuse_incompatible(output: Path, recipe: SimpleNamespace) -> dict[str, tuple]:
    """The changed constants where the run in `output` can go on with them; else raises UserError.

    `find` asks before the inputs are read; the scripts ask again once they are and their fingerprints known.
    """
    changes = changed_constants(output, recipe)
    for name in (INCOMPATIBLE | INCOMPATIBLE_INPUTS.keys()) & changes.keys():
        if name != "MODEL_READ" or recipe.USE_LORA:  # a checkpoint of all weights needs no others
            (before, now), folder = changes[name], str(output)
            why = INCOMPATIBLE_INPUTS.get(name, "the weights saved in {!r} do not fit that; change it back").format(
                folder
            )
            raise UserError(f"{name} was {before!r} and is {now!r}: {why}, or start another run with --output")
    return changes


def begin(output: Path, recipe: SimpleNamespace, checkpoint: Path | None) -> dict:
    """Make `output` ready once nothing can be refused any more; returns the results of a resumed run so far.

    What a killed run left half-done goes, and for a new run one that ended before its first save. For a resumed one,
    newer checkpoints, which are damaged, are set aside, and changed constants are named and recorded.
    """
    lock(output)
    if checkpoint is None:
        find(output, recipe, resume=False)  # again: a folder that was not there could not be locked when it looked
    for pattern in LEFTOVERS:
        _delete(output.glob(pattern))
    if checkpoint is None:
        if (output / "recipe" / "recipe.json").exists():  # else these names are somebody else's
            _delete(output / name for name in REPLACEABLE)
        save_recipe(output, recipe)
        return {}
    for damaged in (path for path in list_checkpoints(output) if step_of(path) > step_of(checkpoint)):
        aside = damaged.with_name(f"damaged-{damaged.name}")  # no rotation counts it, no later save meets it
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
    results.pop("finished", None)  # comes last in the file and in the summary
    return results


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def newest_checkpoint(output: Path) -> Path:
    """The newest complete checkpoint. Raises UserError where there is none, naming each damaged one."""
    damaged = []
    for path in reversed(list_checkpoints(output)):
        if (fault := find_fault(path)) is None:
            return path
        damaged.append(f"{path.name} is damaged: {fault}")
    raise UserError(
        f"--resume: {str(output)!r} holds no complete checkpoint"
        + (f" ({'; '.join(damaged)}); start a new run in another --output" if damaged else "; start without --resume")
    )


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = (path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(filter(Path.is_dir, found), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_fault(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be resumed from; None where it is complete. Cheap: no tensor is read."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    for pattern in ("trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state*.pth", "*.safetensors"):
        if not any(checkpoint.glob(pattern)):
            return f"no {pattern}"
    for file in files:
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_text(encoding="utf-8"))
                if file.name == "trainer_state.json" and content["global_step"] != step_of(checkpoint):
                    return f"trainer_state.json is of step {content['global_step']}"
                if file.name.endswith(".safetensors.index.json"):
                    for part in set(content["weight_map"].values()) - {path.name for path in files}:
                        return f"no {part}"
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # compares the header with the file's length
                    pass
            elif file.suffix in (".pt", ".pth"):
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # every reader has errors of its own, and any of them means damage
            return f"{file.name}: {first_line(error)}"
    return None


def checkpoint_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """The size of a checkpoint (weights, and two Adam moments of the trainable ones), and of the saved model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    saved = trainable if trainable < weights else weights  # an adapter's checkpoint holds the adapter only
    return saved + 2 * trainable, weights


def check_disk(output: Path, model: torch.nn.Module, save_limit: int) -> None:
    """Raises UserError where `output`'s disk has no room for what a run still has to save there.

    One checkpoint more than `save_limit` exists while the oldest is replaced (with a limit of 1 the best and the
    newest stay), and the model saved at the end comes on top.
    """
    each, final = checkpoint_bytes(model)
    count = max(save_limit, 2) + 1
    needed = each * max(count - len(list_checkpoints(output)), 1) + final
    free = shutil.disk_usage(existing(output)).free  # of several processes the main one makes the folder, later
    if free < needed:
        raise UserError(
            f"{str(output)!r} has {free / 1e9:.1f} GB free and this run needs {needed / 1e9:.1f} GB more for "
            f"{count} checkpoints and the model; free some, lower SAVE_LIMIT, or name another --output"
        )


# ---------------------------------------------------------------------------------------------- recipe and results
def write_json(path: Path, content: dict) -> None:
    """The same for JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path, key: str) -> dict:
    """A file that a run wrote, with that key in it. Raises UserError where it is damaged or somebody else's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {str(path)!r}: {first_line(error)}; name another --output") from error
    if not (isinstance(content, dict) and key in content):
        raise UserError(f"{str(path)!r} is no file of a run, it has no {key!r}; move it away, or name another --output")
    return content


def read_results(output: Path) -> dict:
    """results.json of an earlier start of this run, or nothing. Raises UserError where it is no such file."""
    return _read_json(output / "results.json", "finished") if (output / "results.json").is_file() else {}


def describe_recipe(recipe: SimpleNamespace) -> dict:
    """All that makes an experiment, as JSON gives it back."""
    names = ("OPEN_SYSTEM_PROMPT", "QUESTION_COLUMN", "ANSWER_COLUMN")
    asked = {name: getattr(prompts, name) for name in names}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "datasets", "peft")}
    names_of_rewards = {"default": lambda reward: reward.__name__}
    return json.loads(json.dumps(vars(recipe) | asked | {"versions": versions}, **names_of_rewards))


def save_recipe(output: Path, recipe: SimpleNamespace) -> None:
    """Keep in `output/recipe/` what made this run: every constant, the versions, the scripts themselves."""
    folder = output / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    project = Path(__file__).parent.parent
    for script in [*project.glob("*.py"), *project.glob("engine/*.py")]:
        copy = folder / script.relative_to(project)
        copy.parent.mkdir(exist_ok=True)
        copy.unlink(missing_ok=True)  # it may be read-only, as the script may be: no mode is copied
        shutil.copyfile(script, copy)
    write_json(folder / "recipe.json", describe_recipe(recipe))


def changed_constants(output: Path, recipe: SimpleNamespace) -> dict[str, tuple]:
    """The constants, prompt and versions that differ from what `output` was begun with: name -> (before, now).

    A fingerprint (..._READ) differs only where both are known: an older run has none, and `find` looks before they are.
    """
    before, now = _read_json(output / "recipe" / "recipe.json", "OUTPUT_DIR"), describe_recipe(recipe)
    old, new = before.pop("OUTPUT_DIR") + os.sep, now.pop("OUTPUT_DIR") + os.sep
    for name, value in before.items():
        if isinstance(value, str) and value.startswith(old):  # the demo's model: the folder may have been moved
            before[name] = new + value.removeprefix(old)
    return {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not (name.endswith("_READ") and None in (before.get(name), now.get(name)))
    }


def save_trained(trainer: Trainer, output: Path, max_tokens: int) -> None:
    """Save the model at the root of `output`; of an adapter also itself, in `adapter/`, and the model merged with it.

    Whoever generates with it by default does so as it was evaluated: greedily, and through Ollama, by the Modelfile
    beside it, under the prompt of the training and with at most `max_tokens` tokens.

    Raises:
        UserError: it cannot be written; the last checkpoint still holds it.
    """
    temporary, lora = output / ".tmp-model", isinstance(trainer.model, PeftModel)
    model = trainer.model.get_base_model() if lora else trainer.model
    model.config.use_cache = True  # the trainer switched it off; whoever loads the model wants it
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
            if path.is_dir():  # no folder replaces another
                _delete([output / path.name])
            os.replace(path, output / path.name)
        temporary.rmdir()
        sync(output)
    except Exception as error:  # as in failure_of
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"the trained model could not be saved ({first_line(error)}); mend that and --resume"
        ) from error


def limit_answers(model: PreTrainedModel, max_tokens: int) -> None:
    """Let whoever generates with the saved model do so as it is evaluated here: greedily, with so many tokens."""
    ends = {name: getattr(model.generation_config, name) for name in ("eos_token_id", "pad_token_id")}
    # `pipeline` samples where do_sample is not said
    model.generation_config = GenerationConfig(**ends, max_new_tokens=max_tokens, do_sample=False)


def open_weights(folder: Path, like: Path) -> None:
    """Let those read the weights in `folder` who may read `like`; safetensors (issue #782) lets the owner alone."""
    for weights in folder.rglob("*.safetensors"):
        shutil.copymode(like, weights)


def failure_of(work: Callable[..., None], *args) -> str | None:
    """Why `work` failed; None where it did not."""
    try:
        work(*args)
    except Exception as error:  # torch, safetensors, tokenizers and Python each say "disk full" by a class of their own
        return first_line(error)
    return None


def _sync_all(folder: Path) -> None:
    """The same for a folder and all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def publish(temporary: Path, final: Path) -> None:
    """Make a checkpoint appear under its name, all of it at once.

    Where the same step was saved before, that checkpoint stays if it is complete: it holds the same, and replacing it
    would take two renames, between which a kill would leave no checkpoint of this step under its name.
    """
    _sync_all(temporary)
    if final.exists() and find_fault(final) is None:
        _delete([temporary])
        return
    _delete([final])
    temporary.rename(final)
    sync(final.parent)


def rotate(output: Path, limit: int, best_step: int | None) -> None:
    """Keep `limit` checkpoints: the newest one and the best one always, then the next newest.

    transformers' rotate_checkpoints keeps the same ones, but deletes in place: a kill half-way leaves a damaged one.
    """
    steps = [step_of(path) for path in reversed(list_checkpoints(output))]
    keep = {steps[0], best_step} & set(steps)
    keep |= set([step for step in steps if step not in keep][: max(limit - len(keep), 0)])
    for step in set(steps) - keep:
        with suppress(OSError):  # it stays, and the next save tries again
            doomed = output / f".tmp-old-checkpoint-{step}"
            (output / f"checkpoint-{step}").rename(doomed)
            shutil.rmtree(doomed)


class StopSignals(TrainerCallback):
    """Within `with StopSignals(trainer) as stop:` Ctrl-C, SIGTERM and SIGHUP end the training after a step, and save.

    The handler only notes the signal, which all processes compare at the end of each step; a second signal finds the
    system's own handler and ends the process at once, but for SIGHUP: the shell of a terminal that closes and the
    kernel both send it. `stop.signal` is 0 or the signal that ended the training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.signal, self.trainer = 0, trainer
        trainer.add_callback(self)

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup has set
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
            with suppress(OSError):  # a terminal that has closed
                os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be in use right now

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.signal = max(gather_object([self.signal]))
        if self.signal:
            control.should_log = True  # before the save, so that a resumed run's history has no gap
            control.should_save = control.should_training_stop = True

    def leave(self, output: Path, results: dict) -> None:
        """End the program as the signal wanted, having kept the results so far and said how to go on."""
        if os.environ.get("RANK", "0") == "0":
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
    """The processes of a run wait for the main one, and leave their group in order.

    One that ended at once could do so while a thread of gloo still holds tensors of its last gather; freeing them then
    aborts the process, and the launcher kills the others.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.destroy_process_group()
