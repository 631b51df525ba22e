"""train_r1.py: the stages of the path, which go on where they were stopped, and what they are fed."""

import copy
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FORK, run_main

import train_r1
from engine import average, stages
from engine.accuracy import sign_test
from engine.console import UserError
from engine.models import load_model
from engine.questions import load_splits, pairs_of, slice_of
from engine.stages import Command, Stage, Stages, run_side_by_side
from engine.templates import carried_prompt, own_template
from engine.traces import write_data

# The smallest path that has every stage
TINY = {
    "COLD_START": "always",
    "COLD_QUESTIONS": 16,
    "ROUNDS": 1,
    "QUESTIONS_PER_ROUND": 48,
    "STEPS": 2,
    "DEV_QUESTIONS": 8,
    "MEASURE_SAMPLES": 2,
    "SAMPLED_QUESTIONS": 4,
    "SFT": {"TEST_QUESTIONS": 2, "MAX_STEPS": 2, "SAVE_EVERY": 1, "ROWS_PER_STEP": 2, "MICRO_BATCH": 2},
    "GRPO": {"TEST_QUESTIONS": 2, "QUESTIONS_PER_STEP": 1, "MICRO_BATCH": 8, "SAVE_EVERY": 1, "EVAL_EVERY": 9},
}


@pytest.fixture
def forks(monkeypatch) -> None:
    """The children are forks of this process, which has imported trl: a new one would take eight seconds each."""
    call = stages.call

    def call_afresh(*args) -> None:
        for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            signal.signal(number, handler)  # a fork has its parent's
        call(*args)

    monkeypatch.setattr(stages, "call", call_afresh)
    monkeypatch.setattr(stages, "CONTEXT", FORK)


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """The demo's base, right now and then, and a data set of few questions."""
    from engine.demo import make_demo

    folder = tmp_path_factory.mktemp("taught")
    make_demo(folder, steps=100)
    train, _, test = load_splits(str(folder / "data"), 8)
    write_data(folder / "few", train=pairs_of(train)[:80], test=pairs_of(test)[:6])
    return folder


def flags_of(taught: Path, output: Path) -> list[str]:
    inputs = ["--model", taught / "model", "--dataset", taught / "few", "--output", output]
    return [str(flag) for flag in ["--demo", "--cpu", *inputs]]


def test_path(taught, tmp_path, capfd, forks):
    """Every stage is done once, in its folder; no question is used twice, and none that is held out.

    The report has a row for every stage. Checkpoints go and models stay. The same command does nothing again, and a
    changed model is refused.
    """
    output = tmp_path / "r1"
    run_main(train_r1.main, *flags_of(taught, output), **TINY)
    said = capfd.readouterr().out
    names = ["measure", "traces", "cold-start", "learnable-1", "grpo-1", "mean-1", "test"]
    assert json.loads((output / "stages.json").read_text())["done"] == names
    for number, name in enumerate(names, start=1):
        assert f"===== stage {number} of 7  {name}: " in said and (output / f"{number:02}-{name}").is_dir()
    assert "python make_traces.py --model" in said and "python train_grpo.py --model" in said
    models = ["03-cold-start", "05-grpo-1/run-1", "05-grpo-1/run-2", "06-mean-1/model"]
    for model in models:
        assert (output / model / "model.safetensors").is_file() and not any((output / model).glob("checkpoint-*"))
    seeds = [json.loads((output / model / "results.json").read_text())["seed"] for model in models[1:3]]
    assert len(set(seeds)) == 2

    asked = [
        [json.loads(line)["question"] for line in (output / stage / "questions.jsonl").read_text("utf-8").splitlines()]
        for stage in ("02-traces", "04-learnable-1")
    ]
    train, dev, test = (pairs_of(rows) for rows in load_splits(str(taught / "few"), 8))
    used = [question for questions in asked for question in questions]
    assert [len(questions) for questions in asked] == [16, 48] and len(set(used)) == 64
    assert set(used) <= {question for question, _ in train} and used != [question for question, _ in train[:64]]
    assert json.loads((output / "stages.json").read_text())["questions"] == {"traces": [0, 16], "learnable-1": [16, 64]}
    assert json.loads((output / "01-measure/dev/eval.json").read_text())["n"] == len(dev) == 8

    report = (output / "report.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in report[4:11]] == names
    filled = [line.split(" | ")[2] != "" for line in report[4:11]]
    assert filled == [True, False, True, False, False, True, False]
    tested = json.loads((output / "07-test/after/eval.json").read_text())
    assert tested["n"] == len(test) == 6 and f"| after | {tested['strict']:.1%} (" in report[-5]
    assert report[-3].startswith("After against before: ") and " points (" in report[-3]
    assert report[-1] == f"The model: {output / '06-mean-1' / 'model'}"
    assert (output / "report.png").stat().st_size > 10_000

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    run_main(train_r1.main, *flags_of(taught, output), **TINY)
    assert "of 7  grpo-1: done" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    with pytest.raises(UserError, match="SEED was 1 and is 2.*--output"):
        run_main(train_r1.main, *flags_of(taught, output), "--seed", 2, **TINY)
    run_main(train_r1.main, *flags_of(taught, output), **TINY | {"MEASURE_SAMPLES": 1})
    assert "note: MEASURE_SAMPLES was 2 and is 1" in capfd.readouterr().out


def test_kill_9_in_each_stage(taught, tmp_path, forks):
    """Killed in every stage once, with its children: the same command goes on and ends with the same model."""
    endings = []
    for name, kills in (("whole", 0), ("killed", 6)):
        output = tmp_path / name
        for kill in range(kills):
            path = FORK.Process(target=run_main, args=(train_r1.main, *flags_of(taught, output)), kwargs=TINY)
            path.start()
            folders = [
                f"{i + 1:02}-{stage}"
                for i, stage in enumerate(
                    json.loads('["measure", "traces", "cold-start", "learnable-1", "grpo-1", "mean-1"]')
                )
            ]
            while not (output / folders[kill]).exists() and path.is_alive():
                time.sleep(0.01)
            time.sleep(0.5)
            path.kill()
            path.join()
            time.sleep(1.5)  # the children notice, and stop after their step
        run_main(train_r1.main, *flags_of(taught, output), **TINY)
        assert len(json.loads((output / "stages.json").read_text())["done"]) == 7
        endings.append((output / "06-mean-1/model/model.safetensors").read_bytes())
    assert endings[0] == endings[1]


def test_no_cold_start_where_the_format_is_known(monkeypatch, taught, tmp_path, capsys):
    """COLD_START = "auto" goes by the measured figures, and says them; both of its stages are named as not needed."""

    def run(self, name, *lanes):
        ran.append(name)
        (self.folder(name) / "learnable").mkdir(parents=True)
        (self.folder(name) / "learnable" / "train.jsonl").write_text("a question\n")

    monkeypatch.setattr(Stages, "run", run)
    monkeypatch.setattr(train_r1, "write_report", lambda *_: "")
    monkeypatch.setattr(train_r1, "draw_report", lambda *_: None)
    for strict, flexible, wanted in ((0.2, 0.3, False), (0.1, 0.3, True)):
        ran = []
        monkeypatch.setattr(train_r1, "read_json", lambda path: {"strict": strict, "flexible": flexible})  # noqa: B023
        output = tmp_path / str(wanted)
        run_main(train_r1.main, *flags_of(taught, output), **TINY | {"COLD_START": "auto"})
        said = capsys.readouterr().out
        assert ("cold-start" in ran) == wanted
        assert ("cold-start: not needed, strict 20.0%, flexible 30.0%" in said) == (not wanted)
        assert ("cold start: strict 10.0%, flexible 30.0%" in said) == wanted


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"QUESTIONS_PER_ROUND": 900}, "72 training questions, fewer than the 916"),
        ({"SEED": 10**8}, "SEED = 100000000"),
        ({"COLD_START": "perhaps"}, "COLD_START = 'perhaps'"),
        ({"GRPO": {"LERNING_RATE": 1}}, "no constant 'LERNING_RATE'"),
        ({"GRPO": {"QUESTIONS_PER_STEP": 0}}, "QUESTIONS_PER_STEP = 0"),
    ],
)
def test_refused_before_anything_starts(constants, said, taught, tmp_path):
    """What cannot work is one line before the first stage."""
    with pytest.raises(UserError, match=said):
        run_main(train_r1.main, *flags_of(taught, tmp_path / "r1"), **TINY | constants)
    assert not [path for path in (tmp_path / "r1").glob("01-*")]


def test_full_disk(taught, tmp_path, monkeypatch):
    """The disk is looked at before the first stage, too."""
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="0.0 GB free and this path needs"):
        run_main(train_r1.main, *flags_of(taught, tmp_path / "r1"), **TINY)


# -------------------------------------------------------------------------------------------------------- its stages
SCRIPT = """
import os, signal, sys, time
from pathlib import Path

def main(argv, **constants):
    output = Path(argv[argv.index("--output") + 1])
    output.mkdir(parents=True, exist_ok=True)
    print("began", output.name, flush=True)
    if constants.get("wait"):
        time.sleep(constants["wait"])
    if constants.get("fail"):
        sys.exit(2)
    (output / "environment").write_text(os.environ.get("CARD", "none"))
"""


@pytest.fixture
def script(tmp_path, monkeypatch, forks):
    """A command that does what its constants say: Command(name, ["--output", folder], constants)."""
    (tmp_path / "some_script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, **constants: Command("some_script", ["--output", str(tmp_path / name)], constants)


def test_lanes_run_side_by_side(script, tmp_path):
    """Two lanes on two workers take the time of one, each in its worker's environment; the second's lines are kept."""
    start = time.perf_counter()
    lanes = ([script("a", wait=2)], [script("b", wait=1), script("c", wait=1)])
    run_side_by_side(lanes, [{"CARD": "0"}, {"CARD": "1"}], tmp_path / "stage")
    assert time.perf_counter() - start < 3.5
    assert [(tmp_path / name / "environment").read_text() for name in "abc"] == ["0", "1", "1"]
    assert (tmp_path / "stage/console-2.txt").read_text().split() == ["began", "b", "began", "c"]
    run_side_by_side(lanes[:1], [{"CARD": "0"}, {"CARD": "1"}], tmp_path / "stage")
    assert (tmp_path / "a/environment").read_text() == "none"  # alone it has the whole machine


def test_a_failure_ends_the_stage(script, tmp_path):
    """A command that fails is named; what runs beside it is stopped, and the stage is not done."""
    plan = {"one": Stage("tries", 1), "two": Stage("goes on", 1)}
    path = Stages(tmp_path, plan, [{}, {}])
    start = time.perf_counter()
    with pytest.raises(UserError, match="exit code 2.*go on with"):
        path.run("one", [script("a", fail=True)], [script("b", wait=60)])
    assert time.perf_counter() - start < 30 and not (tmp_path / "b/environment").exists()
    assert Stages(tmp_path, plan, [{}]).done == []


def test_the_terminal_stops_it(script, tmp_path):
    """A stop signal reaches the commands; this process leaves with the signal's exit code."""
    path = FORK.Process(target=run_side_by_side, args=(([script("a", wait=60)],), [{}], tmp_path / "stage"))
    path.start()
    while not (tmp_path / "a").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    path.terminate()
    path.join(20)
    assert path.exitcode == 128 + signal.SIGTERM and not (tmp_path / "a/environment").exists()


def test_questions_are_taken_once(tmp_path):
    """Each stage gets the next unused ones, whatever was stopped; another count moves the end of the last one."""
    plan = {"one": Stage("", 1), "two": Stage("", 1), "three": Stage("", 1)}
    path = Stages(tmp_path, plan, [{}])
    assert [path.take_questions(name, 5) for name in ("one", "two", "one")] == ["0:5", "5:10", "0:5"]
    again = Stages(tmp_path, plan, [{}])
    assert again.take_questions("two", 7) == "5:12" and again.take_questions("three", 1) == "12:13"


def test_time_left(tmp_path, capfd):
    """It is told at the usual speed: one stage that was stopped often does not make the rest look long."""
    path = Stages(tmp_path, {name: Stage("", 100) for name in ("measure", "traces", "cold-start", "learnable-1")}, [{}])
    path.done, path.seconds = ["measure", "traces", "cold-start"], {"measure": 1e5, "traces": 100, "cold-start": 110}
    path.run("learnable-1", [])
    assert "all that is left takes about 0:01:50" in capfd.readouterr().out


def test_slice_of():
    """FROM:TO as Python slices; what is no range of at least one question is refused."""
    assert [slice_of(text) for text in ("3:5", ":5", "3:", None)] == [
        slice(3, 5),
        slice(None, 5),
        slice(3, None),
        slice(None),
    ]
    for text in ("", "5", "5:5", "6:5", ":0", "-3:", "1:2:3", "a:b", "٣:٥"):
        with pytest.raises(UserError, match="FROM:TO"):
            slice_of(text)


def test_sign_test():
    """Known values: 2 * (1 + 10) / 2**10, and certainty where nothing or nobody parts them."""
    assert sign_test(9, 1) == sign_test(1, 9) == pytest.approx(22 / 1024)
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0


def test_average(demo_base, tmp_path):
    """The mean of three is their mean, tied weights too, and answers as the first was asked; nothing is overwritten."""
    model, tokenizer = load_model(str(demo_base / "model"))
    for i, factor in enumerate((1, 2, 6)):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for weight in scaled.parameters():
                weight.mul_(factor)
        for part in (scaled, tokenizer):
            part.save_pretrained(tmp_path / str(i))
    # the first is from before templates carried the prompt, and before there was an EXAMPLE
    (tmp_path / "0" / "recipe").mkdir()
    (tmp_path / "0" / "recipe" / "recipe.json").write_text('{"SYSTEM_PROMPT": "as the first"}')
    (tmp_path / "0" / "chat_template.jinja").write_text(own_template(tokenizer.chat_template))
    names, output = [str(tmp_path / str(i)) for i in range(3)], ["--output", str(tmp_path / "mean")]
    average.main([*names, *output])
    mean, mean_tokenizer = load_model(str(tmp_path / "mean"))
    for ours, its in zip(mean.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, its * 3)
    assert carried_prompt(mean_tokenizer.chat_template) == [{"role": "system", "content": "as the first"}]
    smaller = type(model)(type(model.config)(**(model.config.to_dict() | {"intermediate_size": 8})))
    for part in (smaller, tokenizer):
        part.save_pretrained(tmp_path / "smaller")
    unused = ["--output", str(tmp_path / "no")]
    for words, said in (
        ([*names, *output], "in use"),
        ([names[0], str(tmp_path / "smaller"), *unused], "another architecture"),
        ([names[0], *unused], "alone"),
    ):
        with pytest.raises(UserError, match=said):
            average.main(words)
    assert not (tmp_path / "no").exists()
