"""studies/study_pipeline.py: its commands can be typed, a finished stage is not run again, and the table is right."""

import json
from pathlib import Path

import pytest
import study_pipeline as study

import make_traces
import train_grpo
import train_sft

PARSERS = {  # script -> its command line without the script's name, to what it makes of that
    "train_grpo.py": lambda words: train_grpo.configure(words, {})[0],
    "train_sft.py": lambda words: train_sft.configure(words, {})[0],
    "make_traces.py": make_traces.parse_flags,
}


def test_commands_can_be_typed(tmp_path):
    """Every stage is a real command with --demo, writes where the next one reads, and starts from what is there."""
    bases = [tmp_path / "base" / name for name in ("untaught", "student")]  # made by whoever names them
    there = [*bases]
    for stage, (script, *words) in study.commands(tmp_path, 7).items():
        flags = PARSERS[script](words)
        assert flags.demo and flags.seed == 7 and flags.output == str(tmp_path / "seed-7" / stage)
        assert Path(flags.model) in there
        assert script != "train_sft.py" or Path(flags.traces).parent in there
        there.append(Path(flags.output))
        there[-1].mkdir(parents=True)  # as the command would: a model that is not there is refused
    assert len(there) == len(bases) + len(study.STAGES)


@pytest.fixture
def ran(monkeypatch):
    """Commands instead of processes; each leaves what a stage leaves."""
    commands = []

    def pretend(command, **_):
        commands.append(command[1:])
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        if command[1] == "make_traces.py":
            (folder / "traces.jsonl").write_text("{}\n" * 3)
        else:
            accuracy = {"strict": 0.5, "strict_ci95": [0.4371, 0.5629]}
            before = accuracy | {"strict": 0.0}
            (folder / "results.json").write_text(json.dumps({"before": before, "after": accuracy}))

    monkeypatch.setattr(study.subprocess, "run", pretend)
    return commands


def test_it_goes_on_where_it_was_stopped(ran, tmp_path, monkeypatch, capsys):
    """A finished stage is not run again, half a stage is; the table has a column a seed and a row a stage."""
    monkeypatch.setattr("sys.argv", ["study_pipeline.py", "--seeds", "2", "--output", str(tmp_path)])
    study.main()
    said = capsys.readouterr().out
    assert len(ran) == 2 * len(study.STAGES) and said.count("$ python ") == len(ran)
    table = said.rpartition("| stage |")[2].splitlines()
    assert table[0] == " seed 0 | seed 1 | CPU seconds |"
    assert "| base | 0.0 (43.7 to 56.3) | 0.0 (43.7 to 56.3) |  |" in table
    assert "| (b) then GRPO | 50.0 (43.7 to 56.3) | 50.0 (43.7 to 56.3) | 0 / 0 |" in table
    assert "| (b) right answers of that | 3 traces | 3 traces | 0 / 0 |" in table
    assert len(table) == 2 + len(study.STAGES) + 2  # the two bases before
    runs = json.loads((tmp_path / "pipeline.json").read_text())
    assert list(runs) == ["0", "1"] and list(runs["1"]) == list(study.STAGES)

    ran.clear()
    (tmp_path / "seed-1" / "rl" / "seconds.json").unlink()  # stopped there
    study.main()
    assert [command[-1] for command in ran] == [str(tmp_path / "seed-1" / "rl")]
