"""What must not get lost: the checkpoints, recipe and results of a run, and an orderly stop.

A checkpoint is written to `.tmp-checkpoint-N`, synced to the disk and renamed, so that `checkpoint-N` is whole or not
there: kill -9 or a power cut at any moment costs the steps since the last save, nothing else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import safe_open
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from console import UserError, first_line, note
from prompts import ANSWER_COLUMN, QUESTION_COLUMN, SYSTEM_PROMPT

# What a run leaves behind that nobody wants overwritten. `base/` (the demo's cache) does not count.
TRAINED = ["checkpoint-*", "*.safetensors", "adapter"]
# What a run writes before its first save, and may be begun again.
BEGUN = ["results.json", "samples.jsonl", "runs", "curves.png", "recipe"]
# What a killed run was about to write, or to delete.
LEFTOVERS = [".tmp-checkpoint-*", ".tmp-old-checkpoint-*", ".tmp-model", ".tmp-*.json*"]

# Constants that may differ when a run is resumed: they say how it is computed, kept and shown, not what is trained.
# MAX_STEPS and EPOCHS are not among them, since the learning rate falls to zero over all steps.
FREE = {"OUTPUT_DIR", "MICRO_BATCH", "GRADIENT_CHECKPOINTING", "SAVE_EVERY", "SAVE_LIMIT", "LOG_EVERY"}
FREE |= {"SAMPLE_EVERY", "EVAL_EVERY", "EVAL_BATCH", "FAST_ROLLOUT", "USE_VLLM", "versions"}


def _whole(holds: Callable[[int], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and holds(value)


def _number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and holds(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _each(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(right, value))


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")  # those that need no other setting of TRL's
RULES = {  # what a constant has to be -> the test, the constants
    "a text": (_text, "MODEL DATASET OUTPUT_DIR PROBE_QUESTION"),
    "True or False": (lambda value: isinstance(value, bool), "GRADIENT_CHECKPOINTING USE_LORA FAST_ROLLOUT USE_VLLM"),
    "a whole number, 1 or more": (
        _whole(lambda value: value >= 1),
        "QUESTIONS_PER_STEP MICRO_BATCH MAX_PROMPT_TOKENS MAX_COMPLETION_TOKENS LORA_RANK "
        "SAVE_EVERY SAVE_LIMIT LOG_EVERY SAMPLE_EVERY EVAL_EVERY EVAL_QUESTIONS EVAL_BATCH",
    ),
    # a group of one is its own baseline
    "a whole number, 2 or more": (_whole(lambda value: value >= 2), "COMPLETIONS_PER_QUESTION"),
    "a whole number, 0 or more": (_whole(lambda value: value >= 0), "WARMUP_STEPS TOP_K"),
    "a whole number from 0 to 2**32 - 1": (_whole(lambda value: 0 <= value < 2**32), "SEED"),  # numpy takes no other
    "-1 or a whole number, 1 or more": (_whole(lambda value: value == -1 or value >= 1), "MAX_STEPS"),
    "a number above 0": (
        _number(lambda value: value > 0),
        "LEARNING_RATE LORA_LEARNING_RATE LORA_ALPHA EPOCHS TEMPERATURE REPETITION_PENALTY",
    ),
    "a number, 0 or more": (_number(lambda value: value >= 0), "WEIGHT_DECAY MAX_GRAD_NORM BETA"),
    "a number above 0, at most 1": (_number(lambda value: 0 < value <= 1), "TOP_P"),
    "a number from 0, below 1": (_number(lambda value: 0 <= value < 1), "LORA_DROPOUT"),
    "a list of numbers from 0, below 1": (_each(_number(lambda value: 0 <= value < 1)), "ADAM_BETAS"),
    "a list of numbers, 0 or more": (_each(_number(lambda value: value >= 0)), "REWARD_WEIGHTS"),
    "a list of texts": (_each(_text), "LORA_MODULES"),
    f"one of {', '.join(LOSSES)}": (LOSSES.__contains__, "LOSS_TYPE"),
    "one of group, batch, none": (("group", "batch", "none").__contains__, "SCALE_REWARDS"),
}


def check_constants(recipe: SimpleNamespace) -> None:
    """Raises UserError for the first constant of a wrong type or out of its range, or for a vLLM that is not there."""
    for words, (right, names) in RULES.items():
        for name in names.split():
            value = getattr(recipe, name)
            if not right(value):
                raise UserError(f"{name} = {value!r} is not {words}; mend it in train_grpo.py, or by its flag")
    if recipe.USE_VLLM and importlib.util.find_spec("vllm") is None:
        raise UserError("USE_VLLM = True needs vLLM: pip install vllm==0.30.0, or set it to False")


# -------------------------------------------------------------------------------------- the output folder, before
def once(work: Callable[[], Any], cpu: bool) -> Any:
    """What `work()` returns, done by the main process while all others wait for it.

    Raises:
        UserError: the one that `work` raised, in every process, so that none is left waiting.
    """
    state = PartialState(cpu=cpu, timeout=timedelta(minutes=30))  # Trainer's own; NCCL's 10 are short
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def claim(output: Path) -> None:
    """Make `output` ready for a new run, and clear away a run that ended before its first save.

    Raises:
        UserError: it holds something that was trained, is no folder, or cannot be written to.
    """
    _clean(output)
    held = [path for pattern in TRAINED for path in sorted(output.glob(pattern))]
    finished = read_results(output).get("finished")
    if held or finished:
        raise UserError(
            f"{str(output)!r} already holds a {'finished ' if finished else ''}run "
            f"({held[0].name if held else 'results.json'}), which is never overwritten; "
            f"{'' if finished else 'continue it with --resume, or '}name another folder with --output"
        )
    if (output / "recipe" / "recipe.json").exists():  # else these names are somebody else's
        _delete(output / name for name in BEGUN)


def _clean(output: Path) -> None:
    """Delete what a killed run left half-done. Raises UserError where nothing can be written."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # tried, since no look at permissions tells about all file systems
            pass
    except OSError as error:
        what = "is a file" if there == output and output.is_file() else f"cannot be written to ({error.strerror})"
        raise UserError(f"--output {str(output)!r} {what}; name another folder") from error
    for pattern in LEFTOVERS:
        _delete(output.glob(pattern))


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def newest_checkpoint(output: Path) -> Path:
    """The newest complete checkpoint. Damaged newer ones are named and renamed to `damaged-checkpoint-N`.

    Raises:
        UserError: there is no complete one, or the folder cannot be written to.
    """
    damaged = {}
    _clean(output)
    for path in reversed(list_checkpoints(output)):
        if fault := find_fault(path):
            damaged[path] = fault
            continue
        for other, other_fault in damaged.items():
            aside = other.with_name(f"damaged-{other.name}")  # no rotation counts it, no later save meets it
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            note(f"{other.name} skipped, it is damaged ({other_fault}); it is now {aside.name}")
        return path
    faults = "; ".join(f"{path.name} is damaged: {fault}" for path, fault in damaged.items())
    raise UserError(
        f"--resume: {str(output)!r} holds no complete checkpoint"
        + (f" ({faults}); start a new run in another --output" if faults else "; start without --resume")
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
    wanted = {"trainer_state.json": "*_state.json", "scheduler.pt": "scheduler.pt", "rng_state.pth": "rng_state*.pth"}
    if len(files) == len(list(checkpoint.iterdir())):  # FSDP and DeepSpeed keep weights and optimizer in folders
        wanted |= {"optimizer.pt": "optimizer.pt", "weights (*.safetensors)": "*.safetensors"}
    for name, pattern in wanted.items():
        if not any(checkpoint.glob(pattern)):
            return f"no {name}"
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
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{str(output)!r} has {free / 1e9:.1f} GB free and this run needs {needed / 1e9:.1f} GB more for "
            f"{count} checkpoints and the model; free some, lower SAVE_LIMIT, or name another --output"
        )


# ---------------------------------------------------------------------------------------------- recipe and results
def write_json(path: Path, content: dict) -> None:
    """Write all of it or nothing: readers never meet half a file."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {first_line(error)}; name another --output") from error


def read_results(output: Path) -> dict:
    """results.json of an earlier start of this run, or nothing. Raises UserError where it is damaged."""
    return _read_json(output / "results.json") if (output / "results.json").is_file() else {}


def _describe(recipe: SimpleNamespace) -> dict:
    """All that makes an experiment, as JSON gives it back."""
    prompt = {"SYSTEM_PROMPT": SYSTEM_PROMPT, "QUESTION_COLUMN": QUESTION_COLUMN, "ANSWER_COLUMN": ANSWER_COLUMN}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "datasets", "peft")}
    return json.loads(json.dumps(vars(recipe) | prompt | {"versions": versions}))


def save_recipe(output: Path, recipe: SimpleNamespace) -> None:
    """Keep in `output/recipe/` what made this run: every constant, the versions, the scripts themselves."""
    folder = output / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    for script in Path(__file__).parent.glob("*.py"):
        shutil.copy(script, folder)
    write_json(folder / "recipe.json", _describe(recipe))


def check_recipe(output: Path, recipe: SimpleNamespace, checkpoint: Path, force: bool) -> None:
    """Hold the recipe against the one that `output` was begun with; with `force`, continue under the new one.

    Raises:
        UserError: constants differ (those in FREE may), and not `force`: it names each of them; or they do not, and
            the run is finished.
    """
    file = output / "recipe" / "recipe.json"
    before, now = _read_json(file), _describe(recipe)
    inside = [f"{described['OUTPUT_DIR']}{os.sep}" for described in (before, now)]  # the folder may have been moved
    changes = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - FREE)
        if _inside(before.get(name), inside[0]) != _inside(now.get(name), inside[1])
    ]
    if changes and not force:
        raise UserError(
            f"the recipe has changed since {str(output)!r} was begun: {', '.join(changes)}; change it back, pass "
            "--force-recipe to continue under the new one, or start another run with --output"
        )
    if changes:
        note(f"continuing {checkpoint.name} under a changed recipe: {', '.join(changes)}")
        shutil.copy(file, file.with_name(f"recipe-until-{step_of(checkpoint)}.json"))
        save_recipe(output, recipe)
    elif _is_finished(output, checkpoint):
        raise UserError(
            f"the run in {str(output)!r} is finished, nothing is left to resume; start another with --output"
        )


def _is_finished(output: Path, checkpoint: Path) -> bool:
    results, saved = read_results(output), any(output.glob("*.safetensors"))
    return saved and results.get("finished", False) and results["steps"] == step_of(checkpoint)


def _inside(value: Any, folder: str) -> Any:
    return value.removeprefix(folder) if isinstance(value, str) else value


def save_trained(trainer: Trainer, output: Path) -> None:
    """Save the model at the root of `output`; of an adapter also itself, in `adapter/`, and the model merged with it.

    Raises:
        UserError: it cannot be written; the last checkpoint still holds it.
    """
    temporary, lora = output / ".tmp-model", isinstance(trainer.model, PeftModel)
    trainer.model.config.use_cache = True  # the trainer switched it off; whoever loads the model wants it
    try:
        trainer.save_model(str(temporary / "adapter" if lora else temporary))
        if not trainer.args.should_save:
            return
        if lora:
            trainer.model.merge_and_unload().save_pretrained(temporary)
            trainer.processing_class.save_pretrained(temporary)
        for path in temporary.iterdir():
            _sync(path)
            if path.is_dir():  # no folder replaces another
                _delete([output / path.name])
            os.replace(path, output / path.name)
        temporary.rmdir()
    except Exception as error:  # as in _attempt
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"the trained model could not be saved ({first_line(error)}); mend that and --resume"
        ) from error


def attempt(work: Callable[..., None], *args) -> str | None:
    """Why `work` failed; None where it did not."""
    try:
        work(*args)
    except Exception as error:  # torch, safetensors, tokenizers and Python each say "disk full" by a class of their own
        return first_line(error)
    return None


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders and needs none synced
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, final: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    _sync(final.parent)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint under another name, so that a kill half-way leaves no damaged one."""
    doomed = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def rotate(output: Path, limit: int, best_step: int | None) -> None:
    """Keep `limit` checkpoints: the newest one and the best one always, then the next newest."""
    steps = [step_of(path) for path in reversed(list_checkpoints(output))]
    keep = {steps[0], best_step} & set(steps)
    keep |= set([step for step in steps if step not in keep][: max(limit - len(keep), 0)])
    for step in steps:
        if step not in keep:
            with suppress(OSError):  # it stays, and the next save tries again
                _remove(output / f"checkpoint-{step}")


class StopSignals(TrainerCallback):
    """Within `with StopSignals(trainer) as stop:` Ctrl-C and SIGTERM end the training after a step, with a save.

    The handler only notes the signal, which all processes compare at the end of each step; a second signal finds the
    system's own handler and ends the process at once. `stop.signal` is 0 or the signal that ended the training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.signal = 0
        trainer.add_callback(self)

    def __enter__(self) -> StopSignals:
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
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
            words = [word for word in sys.argv if word not in ("--resume", "--force-recipe")]
            launcher = "python" if os.environ.get("WORLD_SIZE", "1") == "1" else "(the same launcher)"
            saved = list_checkpoints(output)
            how = (
                f"continue {saved[-1].name} with\n    {launcher} {shlex.join(words)} --resume" if saved else "not saved"
            )
            print(f"stopped by {signal.Signals(self.signal).name}; {how}", flush=True)
        sys.exit(128 + self.signal)


@contextmanager
def memory_advice(recipe: SimpleNamespace, model: torch.nn.Module, processes: int) -> Iterator[None]:
    """Turns a GPU's out-of-memory error in the `with` block into a UserError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        files = {Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)}
        advice = advise(recipe, model, processes, generating="rollout.py" in files)
        if os.environ.get("LOCAL_RANK", "0") != "0":  # maybe alone in this, and `run` lets only the first one speak
            print(f"error: {advice}", file=sys.stderr, flush=True)
        raise UserError(advice) from error


def advise(recipe: SimpleNamespace, model: torch.nn.Module, processes: int, generating: bool) -> str:
    """The constants to lower when a GPU's memory is full, the cheapest first, each with what it is worth."""
    config, tokens = model.config, recipe.MAX_PROMPT_TOKENS + recipe.MAX_COMPLETION_TOKENS
    rows = recipe.QUESTIONS_PER_STEP * recipe.COMPLETIONS_PER_QUESTION // processes
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * rows * tokens / 1e9  # of two bytes
    weights = 4 * sum(p.numel() for p in model.parameters()) / 1e9
    smaller = max((n for n in range(1, recipe.MICRO_BATCH) if recipe.MICRO_BATCH % n == 0), default=0)
    same = [  # training stays the same
        (smaller, f"MICRO_BATCH {recipe.MICRO_BATCH} -> {smaller} (slower)"),
        (not recipe.GRADIENT_CHECKPOINTING, "GRADIENT_CHECKPOINTING = True (about a quarter slower)"),
        (recipe.EVAL_BATCH > rows, f"EVAL_BATCH {recipe.EVAL_BATCH} -> {rows}"),
    ]
    other = [
        (recipe.BETA and not recipe.USE_LORA, f"BETA = 0 (frees the reference model, {weights:.1f} GB)"),
        (True, f"MAX_COMPLETION_TOKENS ({rows} x {tokens} tokens at a time keep {cache:.1f} GB of keys and values)"),
        (recipe.QUESTIONS_PER_STEP > 1, f"QUESTIONS_PER_STEP {recipe.QUESTIONS_PER_STEP} (the same)"),
        (not recipe.USE_LORA, f"USE_LORA = True (frees {3 * weights:.1f} GB of gradients and optimizer state)"),
    ]
    if generating:  # where micro batches play no part
        same = same[2:]
    used = ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties().total_memory
        used = f" ({torch.cuda.max_memory_allocated() / 1e9:.1f} of {total / 1e9:.1f} GB used)"
    cheap, costly = ("; ".join(text for holds, text in group if holds) for group in (same, other))
    return (
        f"out of GPU memory{used} while {'generating' if generating else 'training'}; lower, the cheapest first: "
        + (f"{cheap}, all of which --resume allows; " if cheap else "")
        + f"then, as a new run, {costly}"
    )
