"""How the program speaks: errors that a user can mend in one line, notes, and the start of every script."""

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path


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
    Ctrl-C exit code 130.

    Args:
        outlive_reader: go on where nobody can read any more what is said; False: `main` meets the error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell closed it, as `>&-` does; no other file may get its number
            setattr(sys, name, open(os.devnull, mode))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.reconfigure(errors="replace")  # a completion may hold what this console cannot show
        if outlive_reader:
            end, lines = io.BufferedWriter(Unfailing(stream)), stream.line_buffering or stream.write_through
            stream = io.TextIOWrapper(end, stream.encoding, "replace", line_buffering=lines)
        setattr(sys, name, stream)
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on this machine one is enough
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
        print(file=sys.stderr)  # the terminal shows ^C and stays in that line
        sys.exit(130)


def cache_fault(error: BaseException | None) -> str | None:
    """What to say where an error, or one that it came from, is about the hub's cache, which data sets use too."""
    while error is not None:
        if isinstance(error, OSError) and error.filename and not isinstance(error, FileNotFoundError):
            from huggingface_hub.constants import HF_HOME

            if Path(str(error.filename)).is_relative_to(HF_HOME):
                return f"the cache in {HF_HOME!r} cannot be used: {error}; set HF_HOME to a folder that can be written"
        error = error.__cause__ or error.__context__
    return None


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
