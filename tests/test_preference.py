"""A reward model beside the rules: ranks of final answers where a question has no label, and nothing else changes."""

import json
import math
import os
import shutil
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import run_main, run_two_processes
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

import train_grpo
from engine import preference, rollout
from engine.console import UserError
from engine.curves import read_history
from engine.models import load_reward_model
from engine.preference import final_answer, load_preference, rank_group, score
from engine.questions import load_questions
from engine.templates import encode
from prompts import ANSWER_COLUMN, OPEN_SYSTEM_PROMPT, QUESTION_COLUMN
from rewards import REWARDS

NAMES = [reward.__name__ for reward in REWARDS] + ["preference_reward"]
SMALL = {"QUESTIONS_PER_STEP": 4, "COMPLETIONS_PER_QUESTION": 4, "MICRO_BATCH": 8, "MAX_COMPLETION_TOKENS": 64}
SMALL |= {"DEV_QUESTIONS": 4, "EVAL_EVERY": 99, "SAVE_EVERY": 99, "SAMPLE_EVERY": 1, "BF16": False}
NEVER_CLOSED = "<think>\n想了又想"


@pytest.fixture(scope="module")
def judge(demo_base, tmp_path_factory) -> Path:
    """A reward model with random weights, whose tokenizer is the demo's."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = AutoTokenizer.from_pretrained(demo_base / "model")
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), num_labels=1, num_key_value_heads=1, initializer_range=0.3, **shape)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(demo_base, tmp_path_factory) -> Path:
    """Six training questions with a label and six without, and four test questions."""
    data, folder = load_from_disk(demo_base / "data"), tmp_path_factory.mktemp("mixed")
    train = data["train"].select(range(12)).to_dict()
    train[ANSWER_COLUMN] = [label if i % 2 else None for i, label in enumerate(train[ANSWER_COLUMN])]
    DatasetDict(train=Dataset.from_dict(train), test=data["test"].select(range(4))).save_to_disk(folder)
    return folder


def written(text: str) -> str:
    return f"<think>\n想一想\n</think>\n<answer>\n{text}\n</answer>"


def group_of(label: int | None) -> list[str]:
    """The four completions of every question: a good one, twice the same, and one that never comes to its answer."""
    good = "这是一个完整的回答。" if label is None else label
    return [written(good), written("-1"), NEVER_CLOSED, written("-1")]


@pytest.fixture(scope="module")
def train(demo_base, judge, mixed):
    """Runs main() in this process on these completions and returns its trainer: train(output, 2, MICRO_BATCH=4)."""
    rows = load_from_disk(mixed)["train"]
    labels = dict(zip(rows[QUESTION_COLUMN], rows[ANSWER_COLUMN], strict=True))

    def generate(self, prompts, trainer):
        tokenizer = trainer.processing_class
        texts = [group_of(labels[prompt[-1]["content"]])[i % 4] for i, prompt in enumerate(prompts)]
        completions = [encode_text(tokenizer, f"{text}<|im_end|>") for text in texts]
        return {"prompt_ids": encode(tokenizer, prompts), "completion_ids": completions, "logprobs": None}

    def run(output: Path, steps: int, **constants: object):
        flags = ["--cpu", "--model", demo_base / "model", "--dataset", mixed, "--max-steps", steps, "--output", output]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout.Rollout, "__call__", generate)
            return run_main(train_grpo.main, *flags, **SMALL | {"REWARD_MODEL": str(judge)} | constants)

    return run


def encode_text(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def raw_score(judge):
    """The reward model's score of a question and an answer, worked out without any of the code that is tested."""
    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = Qwen2ForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()

    @torch.no_grad()
    def work_out(question: str, answer: str) -> float:
        turns = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        hidden = model.model(torch.tensor([encode_text(tokenizer, turns)])).last_hidden_state[0, -1]
        return (hidden @ model.score.weight[0]).item()

    return work_out


# ------------------------------------------------------------------------------------------------- ranks of a group
@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([3.0, -1.0, 2.0], [1.0, 0.0, 0.5]),
        ([1e30, 1.0, 0.0, -1e-30], [1.0, 2 / 3, 1 / 3, 0.0]),  # no scale
        ([5.0, 5.0, 1.0], [0.75, 0.75, 0.0]),
        ([2.0, 2.0], [0.5, 0.5]),
        ([-math.inf, 0.0, -math.inf, 1.0], [1 / 6, 2 / 3, 1 / 6, 1.0]),
        ([None, None], [None, None]),
    ],
)
def test_ranks(scores, ranks):
    """From 0 to 1, ties share their mean rank; a group that is not scored stays so."""
    assert rank_group(scores) == pytest.approx(ranks)
    assert None in scores or sum(ranks) == pytest.approx(len(ranks) / 2)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (written("好"), "好"),
        ("<think>想</think>好，\n<answer>7</answer>", "好，\n7"),
        (NEVER_CLOSED, ""),
        ("<answer>好</answer>", ""),  # what was not thought over is no final answer of this format
        ("<think>想</think> \n<answer></answer>", ""),
        ("", ""),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


def test_scores(judge, raw_score):
    """Through the model's own template, without a system prompt; how many at a time changes nothing."""
    model, tokenizer = load_reward_model(str(judge))
    pairs = [("甲？", "好"), ("一个很长很长的问题？" * 9, "好" * 30), ("丙？", "3"), ("甲？", "不好")]
    dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    expected = [raw_score(*pair) for pair in pairs]
    assert len(set(expected)) == 4
    for at_once in (1, 3, 8):
        assert score(model.eval(), tokenizer, dialogues, at_once) == pytest.approx(expected, abs=1e-4)
    assert score(model, tokenizer, [], 8) == []
    model.score.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="REWARD_MODEL .*no numbers"):
        score(model, tokenizer, dialogues, 8)


# ------------------------------------------------------------------------------------------------------------ a run
def reward_rows(trainer) -> list[dict[str, float]]:
    """The rewards of the last batch, a dictionary for each completion; NaN is None."""
    columns = trainer._logs["rewards"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{name: None if math.isnan(value) else value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
def test_labelled_and_unlabelled_in_one_step(scale, train, raw_score, tmp_path):
    """Rules where there is a label, the rank where there is none, and TRL's advantages of both."""
    trainer = train(tmp_path / "run", 1, SCALE_REWARDS=scale)
    labels, prompts = list(trainer._logs["extra"]["label"]), list(trainer._logs["prompt"])
    assert {None} < set(labels) and list(trainer._logs["rewards"]) == NAMES
    totals = []
    for start in range(0, 16, 4):
        rewards, label, prompt = reward_rows(trainer)[start : start + 4], labels[start], prompts[start]
        before = [{"role": "system", "content": OPEN_SYSTEM_PROMPT}] if label is None else []  # else the template's
        assert prompt[:-1] == before
        column = {name: [row[name] for row in rewards] for name in NAMES}
        assert column["soft_format_reward"] == [0.5, 0.5, 0.0, 0.5]
        assert column["language_reward"] == [1.0] * 4
        if label is None:
            good, other = (raw_score(prompt[-1]["content"], final_answer(text)) for text in group_of(None)[:2])
            expected = [1.0, 0.5, 0.0, 0.5] if good > other else [1 / 3, 5 / 6, 0.0, 5 / 6]
            assert column["preference_reward"] == pytest.approx(expected)
            assert column["digit_reward"] == column["correctness_reward"] == [None] * 4
        else:
            assert column["preference_reward"] == [None] * 4
            assert column["digit_reward"] == [0.5, 0.5, 0.0, 0.5]
            assert column["correctness_reward"] == [2.0, 0.0, 0.0, 0.0]
        weights = [*train_grpo.REWARD_WEIGHTS, train_grpo.PREFERENCE_WEIGHT]
        totals.append([sum(w * (row[name] or 0.0) for w, name in zip(weights, NAMES, strict=True)) for row in rewards])
    flat = [total for group in totals for total in group]
    expected = []
    for group in totals:
        divisor = {"batch": stdev(flat), "group": stdev(group), "none": 1 - 1e-4}[scale] + 1e-4
        expected += [(total - fmean(group)) / divisor for total in group]
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-4)


def test_steps_of_one_kind(train, tmp_path, capsys):
    """A step without any label and one with nothing else: no false stop, no alarm, figures of what was there only."""
    train(tmp_path / "run", 12, QUESTIONS_PER_STEP=1, MICRO_BATCH=4)
    said = capsys.readouterr().out
    assert "ALARM" not in said and "6 training questions without a label" in said
    assert said.count("correct  25%") == 6 and said.count("correct    -") == 6 and "nan" not in said
    history = read_history(tmp_path / "run")[1:]
    assert all(math.isfinite(value) for row in history for value in row.values())
    labelled = [row for row in history if "correctness/correct" in row]
    unlabelled = [row for row in history if row not in labelled]
    assert len(labelled) == len(unlabelled) == 6
    for row in history:
        assert row["format/soft_format"] == row["format/hard_format"] == 0.75 and row["format/mark"] == 1
        assert row["reward/zero_variance_groups"] == 0 and row["language/chinese"] == 1
    for row in labelled:
        assert row["correctness/correct"] == 0.25 and row["format/digit"] == 0.75
        assert row["format/all"] == pytest.approx((1 + 3 * 0.75) / 4)
        assert not {"preference/score", "reward/preference_reward"} & set(row)
    for row in unlabelled:
        assert row["reward/preference_reward"] == 0.5 and "preference/score" in row
        assert row["format/all"] == pytest.approx((1 + 2 * 0.75) / 3)
        assert not {"format/digit", "format/preference", "reward/correctness_reward"} & set(row)

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    for sample in (json.loads(line, parse_constant=refuse) for line in lines):
        assert list(sample["rewards"]) == NAMES
        assert (sample["rewards"]["correctness_reward"] is None) == (sample["label"] is None)
        assert (sample["rewards"]["preference_reward"] is None) == (sample["label"] is not None)


def test_a_reward_that_should_apply_is_missed(train, tmp_path, monkeypatch):
    """Of a silent step nothing is expected; of any other a mean that is not finite still ends the run."""
    nothing = [None] * 16
    monkeypatch.setattr(preference, "load_preference", lambda *_: lambda completions, **_: nothing[: len(completions)])
    with pytest.raises(UserError, match="step 1: rewards/.*not finite"):
        train(tmp_path / "run", 2)


def rank_a_share(judge: Path, folder: Path) -> None:
    """One of two processes: the ranks of its three rows, of six in groups of two, with scores that are their texts."""
    PartialState(cpu=True)
    sizes = {"MICRO_BATCH": 2, "COMPLETIONS_PER_QUESTION": 2, "MAX_PROMPT_TOKENS": 9, "MAX_COMPLETION_TOKENS": 9}
    reward = load_preference(SimpleNamespace(REWARD_MODEL=str(judge), **sizes), torch.device("cpu"), None)
    preference.score = lambda model, tokenizer, dialogues, size: [float(d[-1]["content"]) for d in dialogues]
    texts, labels = ["1", "2", "8", "9", "5", "5"], [None, None, None, None, 7, 7]
    rank = int(os.environ["RANK"])
    mine = slice(3 * rank, 3 * rank + 3)
    ranks = reward(
        prompts=[[{"role": "user", "content": "?"}]] * 3, answer=labels[mine],
        completions=[[{"role": "assistant", "content": f"</think>{text}"}] for text in texts[mine]],
    )  # fmt: skip
    (folder / f"ranks-{rank}").write_text(json.dumps(ranks))
    PartialState().wait_for_everyone()  # one that is gone ends the other with an error


def test_a_group_may_be_split_over_two_processes(judge, tmp_path):
    """A group of two, of six rows in all, lies on both of two processes, and its ranks are those of the whole group."""
    assert run_two_processes(rank_a_share, judge, tmp_path) == [0, 0]
    ranks = [json.loads((tmp_path / f"ranks-{rank}").read_text()) for rank in range(2)]
    assert ranks == [[0.0, 1.0, 0.0], [1.0, None, None]]


# --------------------------------------------------------------------------------------------------- what is refused
def test_not_a_reward_model(train, demo_base, tmp_path):
    """A causal language model scores nothing: one line that says so, before anything is written."""
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", 1, REWARD_MODEL=str(demo_base / "model"))
    line = str(error.value)
    assert f"{str(demo_base / 'model')!r} do not make a Qwen2ForSequenceClassification" in line
    assert "score.weight" in line and not (tmp_path / "run").exists()


def without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_two_classes(folder: Path) -> None:
    config = Qwen2Config.from_pretrained(folder)
    config.num_labels = 2
    Qwen2ForSequenceClassification(config).save_pretrained(folder)


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def with_few_positions(folder: Path) -> None:
    config = Qwen2Config.from_pretrained(folder)
    config.max_position_embeddings = 512
    config.save_pretrained(folder)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (without_head, "1 are missing or of another shape, such as score.weight"),
        (with_two_classes, "has 2 outputs, and a reward model has one"),
        (without_template, "no chat template"),
        (with_few_positions, "at most 512 tokens.*MAX_PROMPT_TOKENS 384 . MAX_COMPLETION_TOKENS 512"),
    ],
)
def test_faulty_reward_model(fault, words, judge, tmp_path):
    folder = Path(shutil.copytree(judge, tmp_path / "judge"))
    fault(folder)
    recipe = SimpleNamespace(**train_grpo.default_recipe() | {"REWARD_MODEL": str(folder)})
    with pytest.raises(UserError, match=words) as error:
        load_preference(recipe, torch.device("cpu"), None)
    assert str(folder) in str(error.value)


def test_precision(judge):
    """Its weights are read in bf16 where the device has it, and give nearly the same score."""
    question, answer = {"role": "user", "content": "甲？"}, {"role": "assistant", "content": "好"}
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_reward_model(str(judge), dtype)
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        values += score(model.eval(), tokenizer, [[question, answer]], 8)
    assert values[1] == pytest.approx(values[0], abs=0.1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("REWARD_MODEL", None, "REWARD_MODEL = None is not a text"),
        ("REWARD_MODEL", "./nowhere", "REWARD_MODEL: there is no folder './nowhere'"),
        ("PREFERENCE_WEIGHT", 0, "PREFERENCE_WEIGHT = 0 is not above 0"),
        ("PREFERENCE_WEIGHT", "6", "PREFERENCE_WEIGHT = '6' is not a number"),
        ("REWARD_WEIGHTS", [1.0] * 7, "REWARD_WEIGHTS = .* is not 6 numbers of 0 or more"),
    ],
)
def test_constants_are_checked(name, value, words, train, tmp_path):
    with pytest.raises(UserError, match=words):
        train(tmp_path / "run", 1, **{name: value})
    assert not (tmp_path / "run").exists()


def test_no_label_needs_a_reward_model(train, mixed, tmp_path):
    """Questions without a label are refused where nothing could judge them, and among test questions always."""
    with pytest.raises(UserError, match="'train', row 0: answer_only is None.*train only, with REWARD_MODEL"):
        train(tmp_path / "run", 1, REWARD_MODEL="")
    data = load_from_disk(mixed)
    DatasetDict(train=data["train"], test=data["train"]).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="'test', row 0: answer_only is None.*train only, with REWARD_MODEL"):
        load_questions(str(tmp_path / "data"), "test")
    assert load_questions(str(mixed), "train", unlabelled=True)["answer"][:2] == [None, data["train"][1][ANSWER_COLUMN]]
