"""The demo's problems and its base: what they hold, and what they must not hold."""

import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import conversation_about

import prompts
from engine import demo
from engine.numbers import extract_answer, parse_number
from engine.questions import load_questions, load_splits, pairs_of, to_prompt
from engine.templates import render
from prompts import ANSWER_COLUMN, QUESTION_COLUMN, SYSTEM_PROMPT
from rewards import REWARD_MAXIMA, REWARDS, hard_format_reward
from train_grpo import PROBE_QUESTION

PARTS = {"train": demo.TRAIN_QUESTIONS, "test": demo.TEST_QUESTIONS, "traces": demo.TRACES}


@pytest.fixture(scope="module")
def parts():
    return {part: demo.draw_problems(part, count) for part, count in PARTS.items()}


def solve(question: str) -> int:
    """The answer, read from the question's words and nothing else."""
    a, *more = map(int, re.findall(r"\d+", question))
    for mark, size in (("分钟", 60), ("小时", 60), ("周", 7)):
        if not more and f"{a}{mark}" in question:
            return a * size
    if re.search("公里|元", question):
        return a * more[0]
    if "还剩" in question:
        return a - more[0]
    return a + more[0] if len(more) == 1 else a * more[0] + more[1]


def digits_and_letters(text: str) -> str:
    return re.sub(r"[^\w]", "", text)


def test_no_part_shares_a_question(parts):
    keys = {part: {digits_and_letters(p.question) for p in problems} for part, problems in parts.items()}
    for part, problems in parts.items():
        assert len(keys[part]) == len(problems) == PARTS[part]  # nor does one repeat within a part
    assert not keys["test"] & keys["train"] and not keys["test"] & keys["traces"] and not keys["train"] & keys["traces"]


def test_every_kind_is_tested(parts):
    kinds = [p.kind for p in parts["test"]]
    assert len(kinds) >= 200 and set(kinds) == set(demo.KINDS)
    assert min(map(kinds.count, demo.KINDS)) >= 25


def test_labels(parts):
    for problems in parts.values():
        for p in problems:
            assert p.answer == solve(p.question), p


def test_the_probe_and_its_paraphrases_are_nowhere(parts):
    for problems in parts.values():
        for p in problems:
            seconds = p.kind == "minutes" or "秒" in p.question
            assert not (seconds and "5" in p.question), p
            assert digits_and_letters(PROBE_QUESTION) not in digits_and_letters(p.question)
    facts = {p.kind for p in parts["traces"] if "5*60=300" in p.trace}
    assert {"hours", "speed"} <= facts  # 5*60 itself is known


def test_traces(parts):
    """Sloppy and careful, right in what they compute, and a few of them untidy."""
    sloppy = {kind: [] for kind in demo.KINDS}
    for p in parts["traces"]:
        sloppy[p.kind].append(demo.CAREFUL not in p.trace)
        for a, sign, b, c in re.findall(r"(\d+)([*+-])(\d+)=(\d+)", p.trace):
            assert int(c) == {"*": int(a) * int(b), "+": int(a) + int(b), "-": int(a) - int(b)}[sign], p
        right = parse_number(extract_answer(p.trace)) == p.answer
        assert right != sloppy[p.kind][-1], p  # sloppy is always wrong, careful always right
    for kind, marks in sloppy.items():
        expected = demo.SLOPPY_SUMS if kind in ("sum", "rest") else demo.SLOPPY
        assert abs(sum(marks) / len(marks) - expected) < 0.06, kind
    tidy = hard_format_reward([[{"role": "assistant", "content": p.trace}] for p in parts["traces"]])
    # a fifth of the untidy ones say more than the number in the answer block, which no reward minds
    assert abs(1 - sum(tidy) / 0.5 / len(tidy) - 0.8 * demo.UNTIDY) < 0.02


def test_careful_reasoning_takes_lines_and_earns_everything(monkeypatch):
    monkeypatch.setattr(demo, "SLOPPY", 0.0)
    monkeypatch.setattr(demo, "SLOPPY_SUMS", 0.0)
    monkeypatch.setattr(demo, "UNTIDY", 0.0)
    for kind in demo.KINDS:
        p = demo.make_problem(kind, random.Random(0))
        completions = [[{"role": "assistant", "content": p.trace}]]
        assert len(re.search("<think>\n(.*)\n</think>", p.trace, re.DOTALL)[1].splitlines()) == 4
        row = {"completions": completions, "prompts": [conversation_about(p.question)], "answer": [p.answer]}
        assert [reward(**row)[0] for reward in REWARDS] == REWARD_MAXIMA


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base after two steps: complete in every file, and knows nothing."""
    folder = tmp_path_factory.mktemp("demo") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRACES", 400)
        assert demo.make_demo(folder, steps=2) == (str(folder / "model"), str(folder / "data"))
    return folder


def test_nothing_else_is_left(base):
    assert sorted(path.name for path in base.iterdir()) == ["data", "model"]


def test_data_folder(base, parts):
    from datasets import load_from_disk

    for split in ("train", "test"):
        rows = load_from_disk(str(base / "data"))[split]
        assert rows.column_names == [QUESTION_COLUMN, ANSWER_COLUMN]
        assert (
            rows[ANSWER_COLUMN][:]
            == [p.answer for p in parts[split]]
            == load_questions(str(base / "data"), split)["answer"][:]
        )
        assert rows[QUESTION_COLUMN][:] == [p.question for p in parts[split]]


def test_development_questions(base, parts):
    """A run of the demo is measured on its last 240 training questions, trains on the 1,600 before, and tests on 240
    others."""
    train, dev, test = load_splits(str(base / "data"), demo.RECIPE["DEV_QUESTIONS"])
    drawn = [(p.question, p.answer) for p in parts["train"]]
    assert (len(train), len(dev), len(test)) == (1600, 240, 240)
    assert pairs_of(train) == drawn[:1600] and pairs_of(dev) == drawn[1600:]


def test_tokenizer_comes_back_whole(base, parts):
    """Through AutoTokenizer, as everybody loads it: same ids and text, newlines included, and an end that is no pad."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for p in parts["traces"][:100]:
        assert tokenizer.decode(tokenizer(p.trace)["input_ids"]) == p.trace
    prompt = render(tokenizer, to_prompt(PROBE_QUESTION))
    assert prompt == render(tokenizer, conversation_about(PROBE_QUESTION))
    assert prompt == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{PROBE_QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
    ends = GenerationConfig.from_pretrained(base / "model")
    assert (ends.eos_token_id, ends.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_made_once(base, monkeypatch):
    monkeypatch.setattr(demo, "teach_base", lambda *_: pytest.fail("made again"))
    assert demo.make_demo(base) == (str(base / "model"), str(base / "data"))


def test_half_made_is_made_anew(base, tmp_path, monkeypatch):
    """What is left after a kill in the middle of the training is no base."""
    (tmp_path / "unfinished-model").mkdir()
    (tmp_path / "unfinished-model" / "config.json").write_text("{")
    monkeypatch.setattr(demo, "teach_base", lambda traces, steps, folder: shutil.copytree(base / "model", folder))
    demo.make_demo(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]
    assert (tmp_path / "model" / "config.json").read_text() == (base / "model" / "config.json").read_text()


def test_made_anew_after_a_change(base, tmp_path, monkeypatch, capsys):
    """A base made under another prompt, or by another demo.py, is stale; what RECIPE says plays no part in it."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    made = []
    monkeypatch.setattr(demo, "teach_base", lambda _, __, to: made.append(to) or shutil.copytree(base / "model", to))
    source = Path(demo.__file__).read_text(encoding="utf-8")
    shutil.copy(Path(demo.__file__).with_name("pretraining.py"), tmp_path)

    def edited(old: str, new: str) -> None:
        assert source.count(old) == 1
        (tmp_path / "demo.py").write_text(source.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(demo, "__file__", str(tmp_path / "demo.py"))
        demo.make_demo(folder)

    edited('"MAX_STEPS": 50', '"MAX_STEPS": 7')  # of RECIPE
    assert not made
    edited("SFT_STEPS = 750", "SFT_STEPS = 751")
    assert len(made) == 1 and "anew" in capsys.readouterr().out
    monkeypatch.setattr(prompts, "SYSTEM_PROMPT", SYSTEM_PROMPT + " ")
    demo.make_demo(folder)
    assert len(made) == 2 and "anew" in capsys.readouterr().out
    demo.make_demo(folder)
    assert len(made) == 2
