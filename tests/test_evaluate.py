"""evaluate.py and chat.py: figures that are right, and scripts that work as the README says."""

import json
import math

import pytest
from conftest import error_line, run_script

from accuracy import evaluate, grade, interval, summarize
from prompts import to_conversation


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
        self.answers, self.batches = answers, []

    def generate(self, prompt_ids, max_new_tokens, temperature=0.0, on_finished=None):
        on_finished(len(prompt_ids))
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
    questions = {"prompt": [to_conversation(q) for q in ("aaa", "b", "cc", "ddd")], "answer": [7, 7, 7, 7]}
    figures, rows = evaluate(sampler, Letters(), questions, 64, batch_size=3)
    assert sampler.batches == [[3, 3, 2], [1]]  # alike lengths together, the longest first
    assert [row["question"] for row in rows] == ["aaa", "b", "cc", "ddd"]
    assert [row["strict"] for row in rows] == [True, False, False, True]
    assert figures["n"] == 4 and figures["strict"] == figures["flexible"] == 0.5
    assert figures["format"] == 0.5 and figures["truncated"] == 0.25
    assert math.isclose(figures["mean_tokens"], sum(len(codes[t]) for t in (right, cut, wrong, right)) / 4)
    assert figures["strict_ci95"] == interval(0.5, 4)
    assert summarize(rows[:2])["strict"] == 0.5 and summarize(rows[:1])["strict"] == 1.0  # of any part of them


def test_evaluate_script(demo_base, tmp_path):
    """The command writes both files, limits itself, takes another folder and prints the interval."""
    done = run_script(
        "evaluate.py", demo_base / "model", "--dataset", demo_base / "data", "--limit", 6, "--output", tmp_path
    )
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert list(figures) == ["n", "strict", "flexible", "format", "mean_tokens", "truncated", "strict_ci95"]
    assert figures["n"] == 6 and "95 % interval" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ["question", "completion", "label", "strict", "flexible", "format", "tokens", "truncated"]
    assert [list(row) for row in rows] == [names] * 6


def test_chat_script(demo_base):
    """A pipe of two questions gets two answers, no prompt signs, and a quiet end; `exit` ends it as well."""
    done = run_script("chat.py", demo_base / "model", stdin="5分钟多少秒\n\n6小时多少分钟\n")
    assert ">>>" not in done.stdout and done.stdout.strip()
    assert run_script("chat.py", demo_base / "model", stdin="5分钟多少秒\nexit\n6小时多少分钟\n").stdout in done.stdout
    sampled = run_script("chat.py", demo_base / "model", "--temperature", 2, stdin="5分钟多少秒\n")
    assert sampled.stdout.strip()


@pytest.mark.parametrize("script", ["evaluate.py", "chat.py"])
def test_unknown_model(script, demo_base):
    """A hub id that cannot be had is one line with the ways out, exit code 2."""
    data = ["--dataset", demo_base / "data"] if script == "evaluate.py" else []
    line = error_line(run_script(script, "nobody/nothing", "--cpu", *data, expect=2, stdin="5分钟多少秒\n"))
    assert "nobody/nothing" in line and "HF_ENDPOINT" in line
