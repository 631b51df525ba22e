"""The long form of test_faults.py: the demo, killed with -9 at random moments and resumed until it is finished.

    python studies/soak_faults.py            # 20 kills, five minutes on one core
    python studies/soak_faults.py --kills 3

It saves after every step, so that many kills fall into a save. After each kill every checkpoint has to be whole; at the
end the model has to be the one that a run without faults gives, to the last bit.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# The demo, saved after each step; a step is small, because there are many.
START = ["studies/train_with.py", "SAVE_EVERY=1", "EVAL_EVERY=20", "QUESTIONS_PER_STEP=4", "MICRO_BATCH=32", "--demo"]


def begin(output: Path, steps: int, *flags: str) -> subprocess.Popen:
    """One start of the run, as a user starts it."""
    command = [sys.executable, *START, "--cpu", "--output", str(output), "--max-steps", str(steps)]
    with open(output.with_suffix(".log"), "a") as log:
        return subprocess.Popen([*command, *flags], cwd=ROOT, stdout=log, stderr=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from engine import checkpoints

    rng, folder = random.Random(flags.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    whole, killed = folder / "whole", folder / "killed"
    assert begin(whole, flags.steps).wait() == 0, (folder / "whole.log").read_text()
    shutil.copytree(whole / "base", killed / "base")

    kills = inside = 0
    while not checkpoints.read_results(killed).get("finished"):  # it can end before the last kill
        saved = checkpoints.list_checkpoints(killed)
        step = checkpoints.step_of(saved[-1]) if saved else 0
        run = begin(killed, flags.steps, *(["--resume"] if saved else []))
        if kills == flags.kills:
            assert run.wait() == 0, (folder / "killed.log").read_text()
            continue
        # once it trains again: up to the share of the remaining steps that leaves some for every later kill
        least = step + rng.randint(0, max((flags.steps - step) // (flags.kills - kills), 1))
        while run.poll() is None and not (killed / f"checkpoint-{least}").exists() and least > step:
            time.sleep(0.01)
        if rng.random() < 0.5:  # into a save
            while run.poll() is None and not list(killed.glob(".tmp-*")):
                pass
            time.sleep(rng.random() * 0.03)
        else:
            time.sleep(rng.random() * 0.5)
        run.kill()
        if run.wait() >= 0:  # it had ended by itself
            assert run.returncode == 0, (folder / "killed.log").read_text()
            continue
        kills += 1
        inside += bool(list(killed.glob(".tmp-*")))
        faults = {path.name: checkpoints.find_fault(path) for path in checkpoints.list_checkpoints(killed)}
        assert not any(faults.values()), faults
        print(f"kill {kills:>2}: {', '.join(faults) or 'nothing saved yet'}", flush=True)

    same = (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    after = [checkpoints.read_results(output)["after"]["strict"] for output in (whole, killed)]
    print(f"{kills} kills, {inside} of them inside a save, no checkpoint damaged")
    print(f"strict accuracy {after[1]:.1%}, without faults {after[0]:.1%}")
    print(f"weights {'the same to the last bit' if same else 'DIFFERENT'}")
    shutil.rmtree(folder)
    sys.exit(not same)


if __name__ == "__main__":
    main()
