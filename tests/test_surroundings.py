"""What happens around a run must not cost it: another run, a reader that leaves, a closed terminal, a kill, modes."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import make_traces
import train_grpo
import train_sft
from engine import checkpoints, folder, runs
from engine.console import UserError

# train_grpo.py with small steps, saved after each; `--stop` sends SIGHUP twice in the first one, as a terminal that
# closes does: the kernel sends it, and so does the shell.
DRIVER = """
import signal, sys
import train_grpo
from engine import checkpoints
small = {"QUESTIONS_PER_STEP": 2, "MICRO_BATCH": 8, "SAVE_EVERY": 1, "EVAL_EVERY": 100, "DEV_QUESTIONS": 8}
small |= {"MAX_COMPLETION_TOKENS": 32, "SAMPLE_EVERY": 1, "REWARD_WEIGHTS": [1.0, 1.0, 1.0, 1.0, 3.0, 0.0]}
if "--stop" in sys.argv:
    sys.argv.remove("--stop")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    def hang_up(self, *args, **kwargs):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    checkpoints.StopSignals.on_step_begin = hang_up
train_grpo.run(lambda: train_grpo.main(**small))
"""


@pytest.fixture
def deaf_run(demo_output):
    """Runs two steps of the demo for a reader that leaves after the first line; returns the exit code."""

    def start(*flags: str, **environment: str) -> int:
        command = [sys.executable, "-c", DRIVER, "--demo", "--cpu", "--output", demo_output, "--max-steps", "2", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        run = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)
        assert run.stdout.readline()
        run.stdout.close()
        return run.wait(300)

    return start


# ------------------------------------------------------------------------------------------------ one run in a folder
HOLD = """
import sys, time
from pathlib import Path
from engine.folder import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def arguments(script, output: Path, tmp_path: Path) -> list[str]:
    """Flags under which a script takes its folder, and then finds no data set."""
    (tmp_path / "empty").mkdir(exist_ok=True)
    (tmp_path / "traces.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "1+1"}], "completion": [{"role": "assistant", "content": "2"}]}\n'
    )
    flags = ["--cpu", "--output", str(output), "--dataset", str(tmp_path / "empty")]
    return flags + ["--traces", str(tmp_path / "traces.jsonl")] * (script is train_sft)


def lock_elsewhere(output: Path) -> subprocess.CompletedProcess:
    """Another process tries to lock a folder."""
    command = [sys.executable, "-c", HOLD.replace("time.sleep(600)", ""), output]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", [train_grpo, train_sft, make_traces])
def test_second_run_in_a_folder(script, tmp_path, demo_base):
    """While a process holds the folder each script refuses to run there, naming it; kill -9 of that one frees it."""
    output = tmp_path / "run"
    shutil.copytree(demo_base, output / "base")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, output], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
        with pytest.raises(UserError, match=f"another run is writing to .*process {holder.pid} on .*--output"):
            script.main(arguments(script, output, tmp_path))
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with pytest.raises(UserError, match="empty"):  # the data set: the folder, in which `.lock` and `base` lie, is free
        script.main(arguments(script, output, tmp_path))
    refused = lock_elsewhere(output)
    assert refused.returncode == 1 and f"process {os.getpid()} on " in refused.stderr


def test_a_resumed_run_locks_again(tmp_path):
    """--resume takes the lock before it looks; where there is no folder it makes none."""
    with pytest.raises(UserError, match="no complete checkpoint"):
        train_grpo.main([*arguments(train_grpo, tmp_path / "run", tmp_path), "--resume"])
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        train_grpo.main([*arguments(train_grpo, tmp_path / "run", tmp_path), "--resume"])
    assert f"process {os.getpid()} on " in lock_elsewhere(tmp_path / "run").stderr


def test_other_processes_of_a_run_lock_nothing(tmp_path, monkeypatch):
    """Under a launcher the main process alone takes the lock; the others are its own run."""
    locked = []
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(runs, "lock", locked.append)
    for main in (False, True):
        state = SimpleNamespace(is_main_process=main, num_processes=2, main_process_first=contextlib.nullcontext)
        state.device = torch.device("cpu")
        monkeypatch.setattr(runs, "start_processes", lambda *_, state=state: (state, None))
        with pytest.raises(UserError, match="empty"):
            train_grpo.main(arguments(train_grpo, tmp_path / "run", tmp_path))
        assert locked == [tmp_path / "run"] * main


def test_a_folder_that_was_not_there(tmp_path):
    """It is made and locked once nothing can be refused any more; what another run did there meanwhile is seen."""
    output, recipe = tmp_path / "run", SimpleNamespace(OUTPUT_DIR=str(tmp_path / "run"))
    with pytest.raises(UserError, match="empty"):
        train_grpo.main(arguments(train_grpo, output, tmp_path))
    assert not output.exists()
    checkpoints.begin(output, recipe, None)
    assert f"process {os.getpid()} on " in lock_elsewhere(output).stderr
    write_checkpoint(output / "checkpoint-1", 1)
    with pytest.raises(UserError, match="already holds a run"):
        checkpoints.begin(output, recipe, None)
    assert (output / "checkpoint-1").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_no_locks_on_this_disk(number, tmp_path, monkeypatch, capsys):
    """Where the file system knows no locks a line says so, and the run goes on."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    folder.lock(tmp_path)
    assert re.search(f"^note: .*cannot be locked .*{os.strerror(number)}", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- what is only said
TALK = """
import sys
from engine.console import run
def main():
    for stream in (sys.stdout, sys.stderr):
        for length in (1, 100_000):
            print("x" * length, file=stream, flush=True)
            print("x" * length, file=stream)
    open(sys.argv[1], "w").close()
run(main)
"""


@pytest.mark.parametrize("end", ["a pipe without reader", "a full disk", "a pipe that nobody empties", "closed"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nothing_said_ends_a_script(end, unbuffered, tmp_path):
    """Wherever stdout and stderr lead, `main` gets to its end, with exit code 0."""
    reading, writing = os.pipe()
    if end == "a pipe without reader":
        os.close(reading)
    elif end == "a full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), writing)
    elif end == "a pipe that nobody empties":
        os.set_blocking(writing, False)
    close = "exec >&- 2>&-; " if end == "closed" else ""
    command = ["sh", "-c", close + 'exec "$@"', "sh", sys.executable, "-c", TALK, tmp_path / "reached"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=writing, timeout=60)
    os.close(writing)
    assert (tmp_path / "reached").exists() and done.returncode == 0


def test_what_is_heard_is_whole(tmp_path):
    """With a reader nothing is lost or changed, in the order of each stream, and what it cannot show is replaced."""
    script = "import sys; from engine.console import run\n"
    script += "run(lambda: (print('多少', '\\udcff'), print('x' * 99_999, end=''), print('e', file=sys.stderr)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout.decode() == "多少 ?\n" + "x" * 99_999 and done.stderr == b"e\n"


def test_training_whose_reader_leaves(deaf_run, demo_output):
    """`python train_grpo.py --demo | head -1` trains to its end, saves the model and writes its results."""
    assert deaf_run() == 0
    assert json.loads((demo_output / "results.json").read_text())["finished"]
    assert (demo_output / "model.safetensors").exists() and (demo_output / "README.md").exists()


def test_terminal_that_closes(deaf_run, demo_output):
    """SIGHUP, twice and with nobody to hear anything: the step is finished and saved, as after SIGTERM."""
    assert deaf_run("--stop") == 128 + signal.SIGHUP
    assert checkpoints.find_fault(demo_output / "checkpoint-1") is None
    results = json.loads((demo_output / "results.json").read_text())
    assert results["steps"] == 1 and not results["finished"]


def test_nohup():
    """A run that was started to outlive its terminal, by nohup, goes on ignoring SIGHUP."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        for found in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGHUP, found)
            with checkpoints.StopSignals(SimpleNamespace(add_callback=lambda _: None)) as stop:
                assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL  # else the next line would end these tests
                signal.raise_signal(signal.SIGHUP)
            assert stop.signal == (signal.SIGHUP if found == signal.SIG_DFL else 0)
            assert signal.getsignal(signal.SIGHUP) == found
    finally:
        signal.signal(signal.SIGHUP, before)


# --------------------------------------------------------------------------------------------------- kills, power cuts
class Killed(BaseException):
    """Passes through every `except`, as a kill does."""


OPERATIONS = ["rename", "replace", "unlink", "rmdir", "fsync"]


def kill_at(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """From the `number`th file-system operation on, all raise Killed; returns the list of those done."""
    done = []

    def counted(name: str, work):
        def run(*args, **kwargs):
            if len(done) == number:
                raise Killed
            done.append(name)
            return work(*args, **kwargs)

        return run

    for name in OPERATIONS:
        patch.setattr(os, name, counted(name, getattr(os, name)))
    return done


def write_checkpoint(path: Path, step: int) -> None:
    """The least that is a complete checkpoint."""
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("scheduler.pt", "optimizer.pt", "rng_state.pth"):
        torch.save({}, path / name)
    save_file({"weight": torch.zeros(1)}, path / "model.safetensors")


@pytest.mark.parametrize("there", ["nothing", "the same step", "the same step, damaged"])
def test_kill_at_every_operation_of_a_save(there, tmp_path):
    """A complete checkpoint is found after a kill at any moment, and after what --resume then deletes: the one before,
    the one of this step once it is there, and never none of a step that had one."""
    recipe, number = SimpleNamespace(OUTPUT_DIR=str(tmp_path)), 0
    checkpoints.save_recipe(tmp_path, recipe)
    while True:
        for path in tmp_path.glob("*checkpoint-*"):
            shutil.rmtree(path)
        write_checkpoint(tmp_path / "checkpoint-1", 1)
        if there != "nothing":
            write_checkpoint(tmp_path / "checkpoint-2", 2)
        if there == "the same step, damaged":
            (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
        write_checkpoint(tmp_path / ".tmp-checkpoint-2", 2)
        whole, killed = there == "the same step", False
        with pytest.MonkeyPatch.context() as patch:
            done = kill_at(patch, number)
            try:
                checkpoints.publish(tmp_path / ".tmp-checkpoint-2", tmp_path / "checkpoint-2")
            except Killed:
                killed = True
        whole = whole or "rename" in done
        newest = checkpoints.newest_checkpoint(tmp_path)
        assert checkpoints.step_of(newest) == (2 if whole else 1), f"killed after {done}"
        checkpoints.begin(tmp_path, recipe, newest)
        assert checkpoints.newest_checkpoint(tmp_path) == newest and not list(tmp_path.glob(".tmp-*"))
        if not killed:
            break
        number += 1
    assert whole and number > 5


def test_saved_model_is_on_the_disk(demo_base, tmp_path, monkeypatch):
    """Every file of model and adapter is synced before it gets its name, and the folder's list of names after that."""
    from peft import LoraConfig, get_peft_model

    from engine.models import load_model

    model, tokenizer = load_model(str(demo_base / "model"))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    events, sync, replace = [], os.fsync, os.replace

    def synced(handle: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def renamed(source, target) -> None:
        events.append(("rename", str(source)))
        replace(source, target)

    args = SimpleNamespace(should_save=True)
    trainer = SimpleNamespace(model=model, processing_class=tokenizer, args=args, save_model=model.save_pretrained)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    checkpoints.save_trained(trainer, tmp_path, max_tokens=32)
    saved = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert {Path("model.safetensors"), Path("adapter/adapter_model.safetensors"), Path("Modelfile")} <= saved
    kinds = [kind for kind, _ in events]
    before = {path for kind, path in events[: kinds.index("rename")] if kind == "sync"}
    assert {str(tmp_path / ".tmp-model" / path) for path in saved} <= before
    last = len(kinds) - 1 - kinds[::-1].index("rename")
    assert ("sync", str(tmp_path)) in events[last:]


# -------------------------------------------------------------------------------------------------------------- modes
def test_read_only_scripts(tmp_path, monkeypatch):
    """Copies of read-only scripts can be replaced, also those that an older run has left read-only."""
    project = tmp_path / "project"
    (project / "engine").mkdir(parents=True)
    scripts = [project / "train_grpo.py", project / "engine" / "checkpoints.py"]
    for script in scripts:
        script.write_text("first")
        script.chmod(0o444)
    copies = [tmp_path / "run" / "recipe" / script.relative_to(project) for script in scripts]
    monkeypatch.setattr(checkpoints, "__file__", str(scripts[1]))
    open_file = open

    def as_a_user(file, mode="r", *args, **kwargs):
        """Tests may run as root, whom no mode stops."""
        if "w" in mode and Path(file).exists() and not Path(file).stat().st_mode & 0o200:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return open_file(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", as_a_user)
    for text in ("second", "third"):
        for script in scripts:
            script.chmod(0o644)
            script.write_text(text)
            script.chmod(0o444)
        checkpoints.save_recipe(tmp_path / "run", SimpleNamespace(OUTPUT_DIR="run"))
        assert [copy.read_text() for copy in copies] == [text, text]
        assert all(copy.stat().st_mode & 0o200 for copy in copies)
        for copy in copies:
            copy.chmod(0o444)
