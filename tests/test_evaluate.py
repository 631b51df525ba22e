"""evaluate.py and chat.py: figures that are right, and scripts that work as the README says."""

import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, conversation_about, error_line, run_main, run_script

import chat
import evaluate as evaluate_script
import train_grpo
from engine import accuracy, console
from engine.accuracy import (
    compare,
    compare_samples,
    evaluate,
    evaluate_samples,
    grade,
    interval,
    read_answers,
    summarize,
    summarize_samples,
)
from engine.console import UserError
from engine.memory import ON_CPU
from engine.questions import load_splits, to_prompt
from engine.templates import CHATML_TEMPLATE, carry_prompt, encode
from prompts import WORKED_EXAMPLE


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("<think>\n2*9\n</think>\n<answer>\n18\n</answer>", True, True),
        ("<answer>18 美元</answer>", True, True),
        ("2*9=18", False, True),  # no block: the last number counts for flexible only
        ("<answer>18</answer><answer>18</answer>", False, True),  # two blocks are no answer
        ("<answer>2 或 18</answer>", False, True),  # two numbers in the block: falls back on the last in the text
        ("18 <answer>17</answer>", False, False),  # the block speaks, and it is wrong
        ("<answer>17</answer> 18", False, False),  # what follows the block does not mend it
        ("", False, False),
        ("没有数字", False, False),
    ],
)
def test_grade(completion, strict, flexible):
    """strict reads the one answer block; flexible falls back on the last number only where that fails."""
    graded = grade(completion, 18)
    assert (graded["strict"], graded["flexible"]) == (strict, flexible)


def test_interval_known_values():
    """Against the published closed form: 0 of 10 reaches up to 27.8 %, 50 of 100 spans 40.4 to 59.6 %."""
    assert interval(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-3)
    assert interval(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-3)
    low, high = interval(1.0, 1319)
    assert high == pytest.approx(1.0) and 0.99 < low < 1


class Parrot:
    """A sampler that answers every prompt with a completion chosen by the prompt's length."""

    eos = [0]

    def __init__(self, answers):
        self.answers, self.batches, self.temperatures = answers, [], []

    def generate(self, prompt_ids, max_new_tokens, temperature=0.0, on_progress=None):
        self.temperatures.append(temperature)
        self.batches.append([len(ids) for ids in prompt_ids])
        return [self.answers[len(ids)] for ids in prompt_ids]


class Letters:
    """A tokenizer of one token per character, 0 at the end."""

    def apply_chat_template(self, conversations, **_):
        return {"input_ids": [[ord(c) for c in messages[-1]["content"]] for messages in conversations]}

    def batch_decode(self, rows, **_):
        return ["".join(map(chr, filter(None, row))) for row in rows]


def test_evaluate_counts():
    """Shares, tokens and truncation are counted over the rows, and rows come back in their own order."""
    right, wrong, cut = ("<think>x</think><answer>7</answer>", "<answer>8</answer>", "<think>")
    codes = {text: [*map(ord, text), *([] if text is cut else [0])] for text in (right, wrong, cut)}
    sampler = Parrot({3: codes[right], 2: codes[wrong], 1: codes[cut]})
    questions = {"prompt": [to_prompt(q) for q in ("aaa", "b", "cc", "ddd")], "answer": [7, 7, 7, 7]}
    figures, rows = evaluate(sampler, Letters(), questions, 64, batch_size=3)
    assert sampler.batches == [[3, 3, 2], [1]]  # alike lengths together, the longest first
    assert [row["question"] for row in rows] == ["aaa", "b", "cc", "ddd"]
    assert [row["strict"] for row in rows] == [True, False, False, True]
    assert figures["n"] == 4 and figures["strict"] == figures["flexible"] == 0.5
    assert figures["format"] == 0.5 and figures["truncated"] == 0.25
    assert math.isclose(figures["mean_tokens"], sum(len(codes[t]) for t in (right, cut, wrong, right)) / 4)
    assert figures["strict_ci95"] == interval(0.5, 4)
    assert summarize(rows[:2])["strict"] == 0.5 and summarize(rows[:1])["strict"] == 1.0  # of any part of them


def test_samples_count():
    """mean is the accuracy of one answer, pass the share of questions with a right one, and both have intervals."""
    right, wrong = {"strict": True}, {"strict": False}
    figures = summarize_samples([[right, wrong], [wrong, wrong], [right, right], [wrong, wrong]])
    assert (figures["samples"], figures["mean"], figures["pass"]) == (2, 0.375, 0.5)
    assert figures["pass_ci95"] == interval(0.5, 4)
    # over questions: their shares 0.5, 0, 1, 0 have a standard deviation of 0.4787; 8 answers alone would give 0.34
    low, high = figures["mean_ci95"]
    assert low == 0.0 and high == pytest.approx(0.375 + 1.96 * 0.4787 / 2, abs=1e-3)
    assert summarize_samples([[wrong, wrong]] * 9)["mean_ci95"] == interval(0.0, 9)  # none right is not certainly none


def test_compare():
    """Nine questions won and one lost, whatever else both have right or wrong: 2 * (1 + 10) / 2**10."""
    before, after = ([{"strict": mark == "1"} for mark in marks] for marks in ("1000000000110", "0111111111110"))
    assert compare(after, before) == "9 won, 1 lost (sign test: p = 0.021)"
    assert compare(before, after) == "1 won, 9 lost (sign test: p = 0.021)"
    assert "p = 1)" in compare(after, after)


def test_compare_samples():
    """The difference of pass@1, by question: what both find easy or hard does not widen its interval."""
    right, wrong = {"strict": True}, {"strict": False}

    def rows(*marks: str) -> list[dict]:
        return [{"samples": [right if mark == "1" else wrong for mark in each]} for each in marks]

    before, after = rows("00", "01", "11", "11"), rows("01", "01", "11", "01")
    assert compare_samples(after, before).startswith("pass@1 +0.0 points (-40.0 to +40.0)")
    # differences of 50, 0, 50 and 0 points: mean 25, standard deviation 28.9 of one, 14.4 of their mean
    after = rows("01", "01", "1111", "11")
    assert compare_samples(after, rows("00", "01", "01", "11")) == "pass@1 +25.0 points (-3.3 to +53.3)"


def test_read_answers(tmp_path):
    """A line separator of Unicode within an answer is no end of a line."""
    rows = [{"completion": "a\u2028b", "strict": True}, {"completion": "", "strict": False}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
    assert read_answers(tmp_path) == rows


def test_against(demo_base, tmp_path, capsys):
    """Another model's answers to the same questions: greedily, and sampled where both have samples."""
    model = tmp_path / "model"
    shutil.copytree(demo_base / "model", model)

    def run(*flags: object) -> list[str]:
        run_main(evaluate_script.main, model, "--dataset", demo_base / "data", "--questions", ":4", "--cpu", *flags)
        return re.findall("^against .*", capsys.readouterr().out, re.MULTILINE)

    other = ["--output", tmp_path / "again", "--against", model]
    with pytest.raises(UserError, match="run `python evaluate.py"):
        run(*other)
    run()
    same = f"against    {model}: 0 won, 0 lost (sign test: p = 1)"
    assert run(*other, "--samples", 2) == [same, f"against    {model}: it was evaluated without --samples"]
    run("--samples", 2)
    assert run(*other, "--samples", 2) == [same, f"against    {model}: pass@1 +0.0 points (+0.0 to +0.0)"]
    with pytest.raises(UserError, match="lacks 1 of the 5 questions"):
        run(*other, "--questions", ":5")


def test_samples_are_drawn_for_each_question():
    """At temperature 1, as many for each question, in the order of the questions."""
    codes = {text: [*map(ord, text), 0] for text in ("<answer>7</answer>", "<answer>8</answer>")}
    sampler = Parrot({3: codes["<answer>7</answer>"], 1: codes["<answer>8</answer>"]})
    questions = {"prompt": [to_prompt("b"), to_prompt("aaa")], "answer": [7, 7]}
    figures, drawn = evaluate_samples(sampler, Letters(), questions, 64, batch_size=4, samples=3)
    assert sampler.temperatures == [1.0, 1.0] and sampler.batches == [[3, 3, 3, 1], [1, 1]]
    assert [[row["question"] for row in rows] for rows in drawn] == [["b"] * 3, ["aaa"] * 3]
    assert (figures["mean"], figures["pass"]) == (0.5, 0.5)


def test_evaluate_script(demo_base, tmp_path):
    """The command writes both files, limits itself, takes another folder and prints the interval."""
    done = run_script(
        "evaluate.py", demo_base / "model", "--dataset", demo_base / "data", "--questions", ":6", "--output", tmp_path
    )
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert list(figures) == ["n", "strict", "flexible", "format", "mean_tokens", "truncated", "strict_ci95"]
    probe = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))
    assert probe["question"] == "5分钟多少秒" and "probe      5分钟多少秒: " in done.stdout
    assert figures["n"] == 6 and "95 % interval" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ["question", "completion", "label", "strict", "flexible", "format", "tokens", "truncated"]
    assert [list(row) for row in rows] == [names] * 6


def test_greedy_figures_outlive_the_sampling(demo_base, tmp_path, monkeypatch):
    """Samples take K times as long as the greedy answers: stopped while they are drawn, it has written the latter."""

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluate.evaluate_samples", stopped)
    flags = ["--dataset", demo_base / "data", "--questions", ":3", "--samples", 2, "--output", tmp_path, "--cpu"]
    with pytest.raises(KeyboardInterrupt):
        evaluate_script.main([str(flag) for flag in [demo_base / "model", *flags]])
    assert json.loads((tmp_path / "eval.json").read_text())["n"] == 3
    assert len((tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_evaluate_script_samples(demo_base, tmp_path, capsys):
    """--samples draws besides the greedy answers: the same of those, the new figures, every answer; and repeats."""

    def run(*flags: object) -> str:
        where = ["--dataset", demo_base / "data", "--questions", ":6", "--output", tmp_path]
        run_main(evaluate_script.main, demo_base / "model", *where, *flags)
        return capsys.readouterr().out

    run()
    greedy = json.loads((tmp_path / "eval.json").read_text())
    said = run("--samples", 3)
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert {name: figures[name] for name in greedy} == greedy
    assert [*figures][len(greedy) :] == ["samples", "mean", "pass", "mean_ci95", "pass_ci95"]
    assert 0 <= figures["mean"] <= figures["pass"] <= 1 and "pass@3" in said
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [[answer["completion"] for answer in row["samples"]] for row in rows]
    assert [len(each) for each in answers] == [3] * 6 and any(len(set(each)) > 1 for each in answers)
    assert run("--samples", 3) == said
    with pytest.raises(UserError, match="--samples -1"):
        run("--samples", -1)


def test_chat_script(demo_base, run_chat):
    """A pipe of two questions gets two answers, no prompt signs, and a quiet end; `exit` ends it as well."""
    model = demo_base / "model"
    done = run_script("chat.py", model, stdin="5分钟多少秒\n\n6小时多少分钟\n")
    assert ">>>" not in done.stdout and done.stdout.strip() and not done.stderr
    first = run_chat(model, stdin="5分钟多少秒\nexit\n6小时多少分钟\n")
    assert first.strip() and done.stdout.startswith(first) and first != done.stdout
    assert run_chat(model, "--temperature", 2, stdin="5分钟多少秒\n").strip()


def test_chat_on_a_terminal(demo_base):
    """A sign to write behind, lines that can be edited (arrow up asks again), and Ctrl-C with an end of its line."""
    ours, its = pytest.importorskip("pty").openpty()
    command, terminal = [sys.executable, "chat.py", str(demo_base / "model")], os.environ | {"TERM": "dumb"}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by tests in the background, it is by their children
    chat = subprocess.Popen(command, cwd=ROOT, env=terminal, stdin=its, stdout=its, stderr=its)
    signal.signal(signal.SIGINT, before)
    os.close(its)  # so that reading fails, not waits, once the script has ended

    def read_until(end: str) -> str:
        said = b""
        while not said.endswith(end.encode()):
            assert select.select([ours], [], [], 300)[0], f"nothing for five minutes, after {said}"
            said += os.read(ours, 4096)
        return said.decode()

    read_until(">>> ")
    answers = []
    for keys in ("5分钟多少秒\n", "\x1b[A\n"):
        os.write(ours, keys.encode())
        answers.append(read_until(">>> ").split("5分钟多少秒")[1])
    assert answers[0] == answers[1] != ">>> "
    time.sleep(1)  # Python's input() misses a signal that comes between its prompt and its waiting for keys
    chat.send_signal(signal.SIGINT)
    assert read_until("\n").strip() == "" and chat.wait(60) == 130


def test_chat_into_a_closed_pipe(demo_base):
    """`python chat.py MODEL | head -c1` ends without a traceback."""
    command = [sys.executable, "chat.py", str(demo_base / "model")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    chat = subprocess.Popen(command, cwd=ROOT, **pipes, text=True)
    chat.stdout.close()
    _, said = chat.communicate("5分钟多少秒\n" * 3, timeout=300)
    assert "Traceback" not in said and "BrokenPipe" not in said and chat.returncode == 0


@pytest.fixture(params=["template", "recipe"])
def trained(request, demo_base, tmp_path) -> Path:
    """The demo's model as a training under another prompt and limit saves it: in its template and generation_config;
    or as the scripts saved it before templates carried prompts, with a large EVAL_BATCH: in recipe.json."""
    model = Path(shutil.copytree(demo_base / "model", tmp_path / "model"))
    template = CHATML_TEMPLATE
    if request.param == "template":
        template = carry_prompt(template, conversation_about("", "按格式", WORKED_EXAMPLE)[:-1])
        limits = json.loads((model / "generation_config.json").read_text()) | {"max_new_tokens": 40}
        (model / "generation_config.json").write_text(json.dumps(limits))
    else:
        (model / "recipe").mkdir()
        recipe = {"SYSTEM_PROMPT": "按格式", "EXAMPLE": WORKED_EXAMPLE, "EVAL_BATCH": 4096, "MAX_COMPLETION_TOKENS": 40}
        (model / "recipe/recipe.json").write_text(json.dumps(recipe))
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return model


def test_asked_as_in_training(trained, demo_base, run_chat, monkeypatch):
    """evaluate.py and chat.py ask a model under the prompt of its training, whatever prompts.py has by now."""
    asked = []

    def record(tokenizer, conversations):
        ids = encode(tokenizer, conversations)
        questions = (messages[-1]["content"] for messages in conversations)
        asked.extend(zip(questions, map(tokenizer.decode, ids), strict=True))
        return ids

    monkeypatch.setattr(accuracy, "encode", record)
    monkeypatch.setattr(chat, "encode", record)
    said = run_chat(trained, "--cpu", stdin="5分钟多少秒\nexit\n")
    evaluate_script.main([str(trained), "--dataset", str(demo_base / "data"), "--questions", ":2", "--cpu"])
    assert len(asked) == 4 and "note" not in said  # chat's, two test questions, and the probe
    for question, text in asked:
        turns = conversation_about(question, "按格式", WORKED_EXAMPLE)
        written = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        assert text == f"{written}<|im_start|>assistant\n"


def test_memory_and_folder_are_this_machines(trained, demo_base, tmp_path, monkeypatch):
    """A model may write as much as in its training, but as many rows at a time as fit here; a wrong --output
    costs no answers."""
    given = []

    def out_of_memory(sampler, tokenizer, questions, tokens, batch, title):
        given.extend((tokens, batch))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluate_script, "evaluate", out_of_memory)
    flags = [str(trained), "--dataset", str(demo_base / "data"), "--cpu"]
    with pytest.raises(SystemExit) as left:
        console.run(lambda: evaluate_script.main(flags))
    assert left.value.code == 2 and given == [40, ON_CPU["EVAL_BATCH"]]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output .*is a file"):
        evaluate_script.main([*flags, "--output", str(tmp_path / "file")])
    assert len(given) == 2


def test_development_questions(demo_base, tmp_path, monkeypatch, capsys):
    """--split dev asks the questions that training keeps for its curves, and says so; without it the test questions."""
    asked = []

    def read(sampler, tokenizer, questions, tokens, batch, title=None):
        if title:  # not the probe
            asked.append(questions["prompt"][:])
        rows = [grade("<answer>1</answer>", 1) | {"completion": "", "tokens": 5, "truncated": False}]
        return summarize(rows), rows

    monkeypatch.setattr(evaluate_script, "evaluate", read)
    flags = [str(demo_base / "model"), "--dataset", str(demo_base / "data"), "--output", str(tmp_path), "--cpu"]
    for more in ([], ["--split", "dev"]):
        evaluate_script.main([*flags, *more])
    _, dev, test = load_splits(str(demo_base / "data"), train_grpo.DEV_QUESTIONS)
    assert asked == [test["prompt"][:], dev["prompt"][:]] and len(dev) == train_grpo.DEV_QUESTIONS
    assert [line.rsplit(", ", 1)[1] for line in re.findall("^data .*", capsys.readouterr().out, re.MULTILINE)] == [
        "test questions",
        "dev questions",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk(demo_base, tmp_path, capsys):
    """Where the figures find no room the user reads one line that says so."""
    (tmp_path / ".tmp-eval.json").symlink_to("/dev/full")  # what is written first, and renamed
    flags = [demo_base / "model", "--dataset", demo_base / "data", "--questions", ":2", "--output", tmp_path, "--cpu"]
    with pytest.raises(SystemExit) as left:
        console.run(lambda: run_main(evaluate_script.main, *flags))
    said = capsys.readouterr().err.replace("\r", "\n")  # the progress bar's
    assert left.value.code == 2 and re.search(r"^error: .*No space left on device; free some", said, re.MULTILINE)
    assert "Traceback" not in said


@pytest.mark.parametrize("script", ["evaluate.py", "chat.py"])
def test_unknown_model(script, demo_base):
    """A hub id that cannot be had is one line with the ways out, exit code 2."""
    data = ["--dataset", demo_base / "data"] if script == "evaluate.py" else []
    line = error_line(run_script(script, "nobody/nothing", "--cpu", *data, expect=2, stdin="5分钟多少秒\n"))
    assert "nobody/nothing" in line and "HF_ENDPOINT" in line
