"""How the program speaks: errors that a user can mend in one line, notes, and the start of every script."""

import errno
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """Something the user can mend; the message is one line that names the value, the place and the remedy."""


class Unfailing(io.RawIOBase):
    """The end of stdout or stderr: what finds no reader, no terminal or no room on a disk is lost, and nothing else."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream = stream  # kept: collected, it would close what is below it
        self.raw = getattr(stream.buffer, "raw", stream.buffer)  # under PYTHONUNBUFFERED there is no buffer between
        self.isatty, self.fileno = self.raw.isatty, self.raw.fileno

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int:
        try:
            return self.raw.write(data) or len(data)  # None: a pipe that would have to be waited for, and may not be
        except OSError:
            return len(data)


def run(main: Callable[[], None], outlive_reader: bool = True) -> None:
    """Run a script's `main`; a UserError becomes one line on stderr and exit code 2, as do a full GPU and a full disk;
    Ctrl-C exit code 130. Where what it says can no longer be written `main` goes on, or meets the error instead."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None: it was closed when Python started
        stream.reconfigure(errors="replace")  # a completion may hold what this console cannot show
        if outlive_reader:
            end, lines = io.BufferedWriter(Unfailing(stream)), stream.line_buffering or stream.write_through
            stream = io.TextIOWrapper(end, stream.encoding, "replace", line_buffering=lines)
        setattr(sys, name, stream)
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on this machine one is enough
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; this file knows no torch
            raise
        print("error: out of GPU memory; lower EVAL_BATCH in train_grpo.py, or pass --cpu", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {first_line(error)}; free some and run it again, a training with --resume", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal shows ^C and stays in that line
        sys.exit(130)


def first_line(error: BaseException) -> str:
    """What an error says, in one line without its full stop; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def note(text: str) -> None:
    """A line that the main process prints for all."""
    if os.environ.get("RANK", "0") == "0":  # set by torchrun and accelerate launch
        print(f"note: {text}", flush=True)


def refuse_missing_folder(name: str, what: str) -> None:
    """Raises UserError for what can only be a folder and is not there: nobody should wait for the hub to say so.

    Args:
        name: a hub id or a folder.
        what: how the message calls it, with the constant or flag to mend.
    """
    path = Path(name)
    like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    inside_one = path.parent != Path(".") and path.parent.is_dir()
    if (like_a_path or inside_one) and not path.exists():
        remedy = "pass a hub id such as owner/name"
        if inside_one:
            remedy += f" (if this is one, rename the folder {str(path.parent)!r}, in which it is looked for)"
        raise UserError(f"{what}: there is no folder {name!r}; mend the path, or {remedy}")


def constants_of(script: ModuleType) -> dict[str, Any]:
    """A script's constants, by name: what stands at its top in capitals with a type.

    Raises:
        UserError: a value in capitals without one, its type lost in editing: it would be passed over in silence.
    """
    types = get_type_hints(script)
    for name, value in vars(script).items():
        plain = name.isupper() and type(value) in (bool, int, float, str)
        if plain and name not in types and name not in ("TYPE_CHECKING", "OUT_OF_MEMORY"):
            script_name = Path(script.__file__).name
            raise UserError(
                f"{name} = {value!r} in {script_name} has no type and is not read; write `{name}: "
                f"{type(value).__name__} = {value!r}`"
            )
    return {name: getattr(script, name) for name in types if name.isupper()}


def check_types(recipe: SimpleNamespace, script: ModuleType) -> None:
    """Raises UserError for the first constant of a recipe that is not of the type that `script` gives it."""
    words = {str: "a text", bool: "True or False", int: "a whole number", float: "a number"}
    words |= {list[str]: "a list of texts", tuple[float, float]: "two numbers"}
    for name, kind in get_type_hints(script).items():
        if name.isupper() and not is_a(value := getattr(recipe, name), kind):
            allowed = words.get(kind) or f"one of {', '.join(map(repr, get_args(kind)))}"
            raise UserError(f"{name} = {value!r} is not {allowed}; mend it in {Path(script.__file__).name}")


# Constants that a flag overrides for one run
FLAGS = {
    "MODEL": "--model",
    "DATASET": "--dataset",
    "OUTPUT_DIR": "--output",
    "SEED": "--seed",
    "MAX_STEPS": "--max-steps",
}


def check_ranges(constants: dict[str, Any], ranges: dict[str, tuple[str, bool]], script: str) -> None:
    """Raises UserError for the first constant out of its range; a number without one has to be above 0, a text filled.

    Args:
        ranges: name -> the range in words, and whether the constant is in it.
        script: the file to mend, by its constant or by the flag that stands for it.
    """
    for name, value in constants.items():
        number = type(value) in (int, float)
        words, holds = ranges.get(name, ("above 0", value > 0) if number else ("a text", value != ""))
        if not holds:
            flag = f", or by {FLAGS[name]}" if name in FLAGS else ""
            raise UserError(f"{name} = {value!r} is not {words}; mend it in {script}{flag}")


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says. True and NaN are no numbers, and a list holds no empty text."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (list, tuple):
        return isinstance(value, list | tuple) and all(is_a(each, get_args(kind)[0]) and each != "" for each in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind
