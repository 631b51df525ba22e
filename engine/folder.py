"""The folder that a run writes to: it must be writable, and no other run may write there at the same time."""

import os
import platform
import tempfile
from pathlib import Path

from engine.console import UserError, first_line, note

HELD: set[Path] = set()  # the lock files of the folders that this process has locked


def existing(output: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (output, *output.absolute().parents) if path.exists())


def check_writable(output: Path) -> None:
    """Raises UserError if nothing can be written to `output`, which need not exist yet."""
    try:
        with tempfile.TemporaryFile(dir=existing(output)):  # permissions alone do not tell on every file system
            pass
    except OSError as error:
        what = "is a file" if output.is_file() else f"cannot be written to ({error.strerror})"
        raise UserError(f"--output {str(output)!r} {what}; name another folder") from error


def lock(output: Path) -> None:
    """Make `output` if it does not exist, and keep other processes from writing a run there until this one ends.

    The operating system releases the lock, also after kill -9. The file `.lock` names the last process that held it. It
    stays, because two processes could each lock a file that is deleted and made again. Raises UserError if another
    process has locked the folder, or if it cannot be written to.
    """
    check_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    path = (output / ".lock").resolve()
    if path in HELD:
        return
    try:
        if _try_lock(os.open(path, os.O_RDWR | os.O_CREAT, 0o666)):  # not closed: that would release the lock
            HELD.add(path)
            path.write_text(f"{os.getpid()} on {platform.node()}")
            return
    except OSError as error:  # some network file systems have no locks
        note(f"{str(output)!r} cannot be locked ({first_line(error)}); start no other run there before this one ends")
        return
    raise UserError(
        f"another run is writing to {str(output)!r}: process {path.read_text(errors='replace')}; wait for it, end it, "
        "or name another folder with --output"
    )


def _try_lock(handle: int) -> bool:
    """Lock an open file without waiting; False if another process has locked it."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, 1 << 20, os.SEEK_SET)  # behind the text: Windows lets nobody else read what is locked
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the first on POSIX, the second on Windows
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and need not sync them
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all: no reader finds half a file."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
