"""Rows of a data set: what is taken, what is dropped and said, what is refused."""

import json
from pathlib import Path

import pytest
from conftest import conversation_about
from test_templates import make_tokenizer

import prompts
from engine.console import UserError, refuse_missing_folder
from engine.questions import check_split, load_questions, pairs_of
from engine.templates import CHATML_TEMPLATE, carry_prompt, render, todays_prompt
from prompts import ANSWER_COLUMN, OPEN_SYSTEM_PROMPT, QUESTION_COLUMN, WORKED_EXAMPLE
from rewards import REWARD_MAXIMA, REWARDS

GOOD = [("3加4等于几？", 7), ("1分钟是多少秒？", 60)]


def write_split(folder: Path, split: str, rows: list[tuple], columns=(QUESTION_COLUMN, ANSWER_COLUMN)) -> None:
    """A split as JSON lines, the layout in which every fault can be written down."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def load(folder: Path, rows: list[tuple], **kwargs) -> list[tuple]:
    """What load_questions makes of these rows, as (question, label)."""
    for split in ("train", "test"):
        write_split(folder, split, rows, **kwargs)
    questions = load_questions(str(folder), "train")
    asked = [question for question, _ in pairs_of(questions)]
    assert questions["prompt"][:] == [[{"role": "user", "content": question}] for question in asked]
    return pairs_of(questions)


def test_good_rows(tmp_path, capsys):
    """Good rows come through as they are, in their order, and nothing is said about them."""
    assert load(tmp_path, GOOD) == GOOD
    assert "note" not in capsys.readouterr().out


def test_example(tmp_path, monkeypatch):
    """A model's template puts EXAMPLE before every question that has a label, and before no other; the one here earns
    all that the rewards can pay."""
    monkeypatch.setattr(prompts, "EXAMPLE", WORKED_EXAMPLE)
    plain = make_tokenizer(CHATML_TEMPLATE)
    carrying = make_tokenizer(carry_prompt(CHATML_TEMPLATE, todays_prompt()))
    load(tmp_path, GOOD)
    for (question, _), prompt in zip(GOOD, load_questions(str(tmp_path), "train")["prompt"], strict=True):
        assert render(carrying, prompt) == render(plain, conversation_about(question, example=WORKED_EXAMPLE))
    write_split(tmp_path, "train", [*GOOD, ("为什么？", None)])
    *_, unlabelled = load_questions(str(tmp_path), "train", unlabelled=True)["prompt"]
    assert [turn["content"] for turn in unlabelled] == [OPEN_SYSTEM_PROMPT, "为什么？"]
    assert render(carrying, unlabelled) == render(plain, unlabelled)
    asked, answered = WORKED_EXAMPLE
    row = {"prompts": [[asked]], "completions": [[answered]], "answer": [42]}
    assert [reward(**row)[0] for reward in REWARDS] == list(REWARD_MAXIMA)


def test_integral_floats_are_integers(tmp_path):
    """One empty or NaN label makes readers turn a whole column into floats: 60.0 is the label 60."""
    assert load(tmp_path, [("甲？", 60.0), ("乙？", -7.0)]) == [("甲？", 60), ("乙？", -7)]


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (("", 3), "''"),
        ((" \n", 3), "not a question"),
        ((None, 3), "None"),
        (("丙？", None), "None"),
        (("丙？", float("nan")), "nan"),
        (("丙？", float("inf")), "inf"),
        (("丙？", 1.5), "1.5"),
        (("丙？", 10**15), "1000000000000000"),
        (("丙？", -(10**18)), "-1000000000000000000"),
        (("丙？", 10**30), "1e+30"),
    ],
)
def test_faulty_row(tmp_path, row, shown):
    """A faulty row is named by data set, split, number and value, wherever it stands."""
    with pytest.raises(UserError) as error:
        load(tmp_path, [*GOOD, row])
    for part in (str(tmp_path), "'train'", "row 2", shown):
        assert part in str(error.value)


@pytest.mark.parametrize("label", ["72", True, [72]])
def test_label_of_another_type(tmp_path, label):
    """A text, a truth value or a list is no label, even where it could be read as one."""
    with pytest.raises(UserError, match=f"row 0: {ANSWER_COLUMN} is .*not an integer"):
        load(tmp_path, [("丙？", label)])


def test_repeated_rows_are_dropped_and_said(tmp_path, capsys):
    """The same question with the same label counts once."""
    assert load(tmp_path, [*GOOD, GOOD[0]]) == GOOD
    assert "1 rows dropped that repeat a question" in capsys.readouterr().out


def test_contradicting_labels_are_dropped_and_said(tmp_path, capsys):
    """Where one question has two labels nobody knows the right one: none of its rows is trained on."""
    assert load(tmp_path, [*GOOD, (GOOD[0][0], 8)]) == GOOD[1:]
    said = capsys.readouterr().out
    assert "1 questions with two different labels dropped" in said and GOOD[0][0] in said
    with pytest.raises(UserError, match="no usable row"):
        load(tmp_path, [GOOD[0], (GOOD[0][0], 8)])


def test_missing_column(tmp_path):
    """The line names the missing column, the ones that are there, and the constant to edit."""
    with pytest.raises(UserError, match=f"no column '{QUESTION_COLUMN}' .*has: question, {ANSWER_COLUMN}.*prompts.py"):
        load(tmp_path, GOOD, columns=("question", ANSWER_COLUMN))


def test_missing_split(tmp_path):
    """The line names the missing split and the ones that are there."""
    write_split(tmp_path, "train", GOOD)
    with pytest.raises(UserError, match="no split 'test' .*has: train"):
        load_questions(str(tmp_path), "test")


def test_empty_split(tmp_path):
    """A split without rows is said by the reader or, where that lets it through, by us."""
    from datasets import Dataset

    (tmp_path / "train.csv").write_text(f"{QUESTION_COLUMN},{ANSWER_COLUMN}\n")
    with pytest.raises(UserError, match='"train" corresponds to no data'):
        load_questions(str(tmp_path), "train")
    nothing = Dataset.from_dict({QUESTION_COLUMN: [], ANSWER_COLUMN: []})
    with pytest.raises(UserError, match="split 'train' has no usable row"):
        check_split({"train": nothing}, "mine", "train")


@pytest.mark.parametrize("content", ["", "no json"])
def test_unreadable_data_set(tmp_path, content):
    """An empty file, garbage: one line that names the place, the file and the way out."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        load_questions(str(folder), "train")
    for part in (str(folder), "train.jsonl: ", "--dataset"):
        assert part in str(error.value)


def test_scripts_are_not_run(tmp_path):
    """A data set that is a Python script is refused, not executed."""
    script = tmp_path / "data" / "data.py"
    script.parent.mkdir()
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError):
        load_questions(str(script.parent), "train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "a/b/c", "output/no-such-run", "C:\\no"])
def test_missing_folders(name, monkeypatch):
    """What can only be a path is refused by name, before anybody waits for the hub."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match="^MODEL .--model.: there is no folder"):
        refuse_missing_folder(name, "MODEL (--model)")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-Instruct", "swulling/gsm8k_chinese", "gpt2", "tests"])
def test_hub_ids_and_folders_pass(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    refuse_missing_folder(name, "MODEL (--model)")
