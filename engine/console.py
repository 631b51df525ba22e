"""How the program speaks: errors of one line that say what to do, notes, and the start of every script."""

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. The message is one line with the value, the place and the remedy."""


class Unfailing(io.RawIOBase):
    """stdout or stderr that never raises: text for a closed pipe, a closed terminal or a full disk is lost."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream = stream  # a stream that nobody holds is closed
        self.raw = getattr(stream.buffer, "raw", stream.buffer)  # with PYTHONUNBUFFERED there is no buffer between
        self.isatty, self.fileno = self.raw.isatty, self.raw.fileno

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int:
        try:
            return self.raw.write(data) or len(data)  # None: the pipe is full, and does not let us wait
        except OSError:
            return len(data)


def run(main: Callable[[], None], outlive_reader: bool = True) -> None:
    """Run a script's `main`. A UserError, a full GPU or a full disk becomes one line and exit code 2, Ctrl-C 130.

    With `outlive_reader` the script goes on when nobody can read its output any more; without, `main` gets the error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell (`>&-`): the next file to be opened would get its number
            setattr(sys, name, open(os.devnull, mode))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.reconfigure(errors="replace")  # a completion may hold characters that this console cannot show
        if outlive_reader:
            end, lines = io.BufferedWriter(Unfailing(stream)), stream.line_buffering or stream.write_through
            stream = io.TextIOWrapper(end, stream.encoding, "replace", line_buffering=lines)
        setattr(sys, name, stream)
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # only one of the processes of this machine says it
            print(f"error: {' '.join((cache_fault(error) or str(error)).split())}", file=sys.stderr)
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
        print(file=sys.stderr)  # the terminal has shown ^C without ending the line
        sys.exit(130)


def cache_fault(error: BaseException | None) -> str | None:
    """What to say if this error, or one that caused it, is about the hub's cache, which data sets use too."""
    while error is not None:
        if isinstance(error, OSError) and error.filename and not isinstance(error, FileNotFoundError):
            from huggingface_hub.constants import HF_HOME

            if Path(str(error.filename)).is_relative_to(HF_HOME):
                return f"the cache in {HF_HOME!r} cannot be used: {error}; set HF_HOME to a folder that can be written"
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop; the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def note(text: str) -> None:
    """Print a line, in the main process only."""
    if os.environ.get("RANK", "0") == "0":  # set by torchrun and accelerate launch
        print(f"note: {text}", flush=True)


def refuse_missing_folder(name: str, what: str) -> None:
    """Raises UserError if `name` cannot be a hub id and is no folder, before anybody waits for the hub.

    `what` is the constant or flag that holds the name.
    """
    path = Path(name)
    like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    inside_one = path.parent != Path(".") and path.parent.is_dir()
    if (like_a_path or inside_one) and not path.exists():
        remedy = "mend the path, or pass a hub id (owner/name) whose owner is not also a folder here"
        raise UserError(f"{what}: there is no folder {name!r}; {remedy}")
