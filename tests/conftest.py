"""What the tests share: no network, the scripts run as a user runs them, and one barely taught tiny model."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.update(
    HF_HUB_OFFLINE="1",  # a test that reaches for the hub fails at once
    CUDA_VISIBLE_DEVICES="",  # the same results on a GPU box
    OMP_NUM_THREADS="1",  # a model this small is as fast on one thread, and steadier
    PYTHONIOENCODING="utf-8",
)


def run_script(*arguments: object, expect: int = 0, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` from the project's root and check its exit code."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake ends in: no traceback, nothing else."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


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
