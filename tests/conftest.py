"""What the tests share: no network, the scripts run as a user runs them, and one barely taught tiny model.

Python needs some eight seconds to import trl, so `main` is called in this process, or in a fork of it, wherever a
process of its own is not the point.
"""

import ast
import contextlib
import io
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.update(
    HF_HUB_OFFLINE="1",  # a test that reaches for the hub fails at once
    CUDA_VISIBLE_DEVICES="",  # the same results on a GPU box
    OMP_NUM_THREADS="1",  # a model this small is as fast on one thread, and steadier
    PYTHONIOENCODING="utf-8",
)


SLOWEST = [f"test_{name}.py" for name in ("train", "faults", "trainer", "traces", "resume", "sft")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, so that the two workers of pytest-xdist end at about the same time."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


FORK = multiprocessing.get_context("fork")  # a process that has imported all that this one has


@pytest.fixture(autouse=True)
def no_precision_of_others(monkeypatch) -> None:
    """A run of train_grpo.py sets the precision in the environment, and TRL's own trainers would follow it there."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def run_main(main: Callable, *flags: object, **constants: object):
    """Call a script's `main` in this process, which it leaves as it was; the trainer, if it came to one."""
    from engine import checkpoints

    trainers, begin = [], checkpoints.StopSignals.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.StopSignals, "__init__", lambda self, it: trainers.append(it) or begin(self, it))
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # to be put back: `main` sets it for its own run
        main([*map(str, flags)], **constants)
    return trainers[0] if trainers else None


def run_two_processes(function: Callable, *args: object) -> list[int]:
    """Call a function in two processes that share a run as torchrun's do; their exit codes, by rank."""
    from accelerate.state import AcceleratorState

    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        AcceleratorState._reset_state(reset_partial_state=True)  # those of the process that this one is a fork of
        function(*args)

    processes = [FORK.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # where it hangs
        process.join()
    return [process.exitcode for process in processes]


def run_script(*arguments: object, expect: int = 0, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` from the project's root and check its exit code."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=1200,
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake ends in: no traceback, nothing else."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def conversation_about(question: str, system: str | None = None, example: list[dict] | None = None) -> list[dict]:
    """All turns that a model without a prompt of its own meets for a question."""
    import prompts

    before = [{"role": "system", "content": system or prompts.SYSTEM_PROMPT}]
    return [*before, *(prompts.EXAMPLE if example is None else example), {"role": "user", "content": question}]


def names_read() -> set[str]:
    """What the scripts read as `x.NAME` or `x["NAME"]`, but for the checks of constants: a check is no use."""
    tops = [
        top
        for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")]
        for top in ast.parse(path.read_text(encoding="utf-8")).body
    ]
    nodes = [n for top in tops if getattr(top, "name", "") != "check_constants" for n in ast.walk(top)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return read | {n.slice.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant)}


FORM_PAID = [1.0, 1.0, 1.0, 1.0, 3.0, 0.0]


@pytest.fixture(scope="session", autouse=True)
def pay_for_the_form() -> Iterator[None]:
    """The tests' base is hardly ever right. With pay for the format too its groups have something to learn.

    Scripts that run in a process of their own pay by default, unless they are told otherwise.
    """
    import train_grpo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_grpo, "REWARD_WEIGHTS", FORM_PAID)
        yield


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory) -> Path:
    """A folder with the demo's `model/` and `data/`, the model after a few steps only: it speaks, badly."""
    from engine.demo import make_demo

    folder = tmp_path_factory.mktemp("base")
    make_demo(folder, steps=30)
    return folder


@pytest.fixture
def demo_output(demo_base, tmp_path) -> Path:
    """An output folder that already caches the tests' base, for `--demo --output`."""
    shutil.copytree(demo_base, tmp_path / "run" / "base")
    return tmp_path / "run"


@pytest.fixture
def run_chat(monkeypatch, capsys) -> Callable[..., str]:
    """Calls chat.py's `main` in this process and returns what it says: run_chat(model, stdin="5分钟多少秒\\n")."""
    import chat

    def ask(*flags: object, stdin: str) -> str:
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        capsys.readouterr()
        with contextlib.suppress(EOFError):  # the end of a pipe
            chat.main()
        return capsys.readouterr().out

    return ask
