"""Development questions: which they are, that nothing is trained on them, and that only they steer a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_main
from datasets import Dataset, load_from_disk
from test_checkpoints import SMALL
from test_traces import STEPS, Boxer, Letters

import evaluate
import make_traces
import train_grpo
import train_sft
from engine import monitor
from engine.console import UserError
from engine.curves import read_history
from engine.questions import load_questions, load_splits, pairs_of, to_prompt, to_row
from engine.traces import to_trace


def write(path: Path, rows: list[dict]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make(folder: Path, **splits: list[int | None]) -> str:
    """A data set folder; the questions of a split are told by these numbers, and None is one without a label."""
    for split, numbers in splits.items():
        write(folder / f"{split}.jsonl", [to_row(f"第{i}题？", i) if i else to_row("为什么？", i) for i in numbers])
    return str(folder)


def labels(rows: Dataset) -> list[int | None]:
    return [label for _, label in pairs_of(rows)]


# ---------------------------------------------------------------------------------------------------------- which
@pytest.mark.parametrize(("dev", "taken"), [(1, [20]), (3, [18, 19, 20]), (4, [17, 18, 19, 20])])
def test_the_last_training_questions(dev, taken, tmp_path):
    """They are the last questions of the train split, as many as asked for, and the others are trained on in order."""
    train, dev_set, test = load_splits(make(tmp_path, train=[*range(1, 21)], test=[30, 31]), dev)
    assert labels(dev_set) == taken and labels(test) == [30, 31]
    assert labels(train) == [label for label in range(1, 21) if label not in taken]


def test_at_most_a_fifth(tmp_path):
    """A small data set gives up a fifth of its questions, whatever is asked for."""
    train, dev_set, _ = load_splits(make(tmp_path, train=[*range(1, 13)], test=[30]), 200)
    assert labels(dev_set) == [11, 12] and labels(train) == [*range(1, 11)]


def test_a_label_is_needed(tmp_path):
    """A question without a label cannot be measured: it is trained on, and the fifth is one of the others."""
    data = make(tmp_path, train=[*range(1, 11), None], test=[30])
    train, dev_set, _ = load_splits(data, 200, unlabelled=True)
    assert labels(dev_set) == [9, 10] and labels(train) == [*range(1, 9), None]


def test_a_validation_split(tmp_path):
    """Where the data set has a split of its own for this, that is taken whole, and what train repeats of it leaves
    train."""
    data = make(tmp_path, train=[1, 2, 3, 40], validation=[40, 41, 42], test=[30])
    train, dev_set, _ = load_splits(data, 1)
    assert labels(dev_set) == [40, 41, 42] and labels(train) == [1, 2, 3]


def test_none_is_a_test_question(tmp_path, capsys):
    """What the test split asks too is no development question: else the test split would choose the best checkpoint."""
    train, dev_set, _ = load_splits(make(tmp_path, train=[*range(1, 11)], test=[4, 10]), 1)
    assert labels(dev_set) == [9] and labels(train) == [1, 2, 3, 5, 6, 7, 8]
    assert "2 training questions dropped that are in the test split too" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train": [1, 2, 3, 4]}, "4 training questions .* and 0 development questions, a fifth of them"),
        ({"train": [1, 2], "validation": [1, 2]}, "0 training questions .* and 2 development questions"),
    ],
)
def test_too_few(splits, words, tmp_path):
    """A data set with nothing to develop with, or nothing to train on, is refused in a line with both numbers."""
    with pytest.raises(UserError, match=words):
        load_splits(make(tmp_path, test=[30], **splits), 200)


# ------------------------------------------------------------------------------------------------ training and curves
@pytest.fixture(scope="module")
def data(demo_base, tmp_path_factory) -> SimpleNamespace:
    """A data set whose splits are 8 training, 2 development and 4 test questions, and these."""
    folder = tmp_path_factory.mktemp("data")
    rows = load_from_disk(demo_base / "data")
    pairs = {
        split: list(zip(*rows[split][:count].values(), strict=True)) for split, count in (("train", 10), ("test", 4))
    }
    for split, each in pairs.items():
        write(folder / f"{split}.jsonl", [to_row(*pair) for pair in each])
    return SimpleNamespace(folder=folder, train=pairs["train"][:8], dev=pairs["train"][8:], test=pairs["test"])


@pytest.fixture(scope="module", params=["train_grpo", "train_sft"])
def run(request, data, demo_base, tmp_path_factory) -> SimpleNamespace:
    """A run of three steps that looks at held-out questions after each. What the model would be found to be is said:
    all right on the test questions, and a part of the development questions that is largest after step 1."""
    strict, asked, evaluate_model = iter([0.1, 0.3, 0.2, 0.25]), [], monitor.evaluate

    def measure(sampler, tokenizer, questions, *args):
        figures, rows = evaluate_model(sampler, tokenizer, questions, *args)
        pairs = list(zip([prompt[-1]["content"] for prompt in questions["prompt"]], questions["answer"], strict=True))
        asked.append(next((name for name in ("dev", "test") if pairs == getattr(data, name)), "probe"))
        return figures | {"strict": next(strict) if asked[-1] == "dev" else 1.0}, rows

    output = tmp_path_factory.mktemp(request.param) / "run"
    flags = ["--cpu", "--model", demo_base / "model", "--dataset", data.folder, "--output", output, "--max-steps", 3]
    constants = SMALL | {"DEV_QUESTIONS": 200, "EVAL_EVERY": 1, "SAVE_EVERY": 3, "MAX_COMPLETION_TOKENS": 60}
    if request.param == "train_sft":
        traces = [
            {"prompt": to_prompt(question), "completion": [{"role": "assistant", "content": to_trace("算一算", label)}]}
            for question, label in data.train + data.dev + data.test
        ]
        flags += ["--traces", write(output.parent / "traces.jsonl", traces)]
        known = train_sft.default_recipe()
        constants = {name: value for name, value in constants.items() if name in known} | {"ROWS_PER_STEP": 4}
        constants["MICRO_BATCH"] = 4
    else:
        constants |= {"COMPLETIONS_PER_QUESTION": 2, "MICRO_BATCH": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "evaluate", measure)
        script = {"train_grpo": train_grpo, "train_sft": train_sft}[request.param]
        trainer = run_main(script.main, *flags, **constants)
    return SimpleNamespace(output=output, trainer=trainer, asked=asked, name=request.param)


def test_none_is_trained_on(run, data):
    """What the trainer gets are the training questions alone; traces on the others are dropped."""
    rows, tokenizer = run.trainer.train_dataset, run.trainer.processing_class
    if run.name == "train_grpo":
        texts = [prompt[-1]["content"] for prompt in rows["prompt"]]
    else:  # SFTTrainer keeps their tokens
        texts = [
            tokenizer.decode(ids).rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
            for ids in rows["input_ids"]
        ]
    assert texts == [question for question, _ in data.train]


def test_what_the_run_looks_at(run):
    """The test split is asked twice, before and after, and gives these figures alone; the curves and the best
    checkpoint go by the development questions."""
    assert run.asked == ["test", "dev", "probe", "dev", "dev", "test", "dev", "probe"]
    assert [row["heldout/strict"] for row in read_history(run.output)] == pytest.approx([0.1, 0.3, 0.2, 0.25])
    results = json.loads((run.output / "results.json").read_text(encoding="utf-8"))
    assert results["best"] == {"step": 1, "strict": 0.3}
    assert [(results[when]["strict"], results[when]["n"]) for when in ("before", "after")] == [(1.0, 4), (1.0, 4)]
    saved = sorted(path.name for path in run.output.glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-3"]  # each new best at once; and by SAVE_EVERY


def test_evaluate_asks_the_same(run, data, tmp_path):
    """evaluate.py --split dev asks the development questions of the run, and without it the test split."""
    for flags, wanted in ((["--split", "dev"], data.dev), ([], data.test)):
        evaluate.main([str(run.output), *flags, "--cpu", "--output", str(tmp_path)])
        rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(row["question"], row["label"]) for row in rows] == wanted


def test_dropped_traces_are_said(data, demo_base, tmp_path, capsys):
    """Where nothing but development and test questions is traced, the line says why none of the rows can be learned."""
    message = [{"role": "assistant", "content": to_trace("算一算", 1)}]
    pairs = [data.dev[0], data.test[0]]
    rows = [{"prompt": to_prompt(question), "completion": message} for question, _ in pairs]
    flags = ["--cpu", "--model", demo_base / "model", "--dataset", data.folder, "--output", tmp_path / "run"]
    with pytest.raises(UserError, match="none of 2 rows can be learned: 2 on test or development questions"):
        run_main(train_sft.main, *flags, "--traces", write(tmp_path / "traces.jsonl", rows))


# ------------------------------------------------------------------------------------------------------------- traces
class Guesser(Boxer):
    """It answers every second sample rightly."""

    def __init__(self):
        self.asked = set()

    def generate(self, prompt_ids, max_new_tokens, temperature):
        self.asked |= {"".join(map(chr, ids)).partition("\n")[0] for ids in prompt_ids}
        answers = (f"{STEPS}\n想了 {i} 遍，一共 \\boxed{{{72 + i % 2}}} 个" for i in range(len(prompt_ids)))
        return [[*map(ord, answer), 0] for answer in answers]


def test_make_traces_leaves_them_alone(tmp_path, monkeypatch):
    """make_traces.py does not ask them, and the data set that it makes for GRPO carries them as its validation split:
    a run on it develops with the same questions."""
    splits = {"train": range(10), "test": range(20, 22)}
    for split, numbers in splits.items():
        write(tmp_path / "data" / f"{split}.jsonl", [to_row(f"第{i}题？", 72) for i in numbers])
    guesser = Guesser()
    monkeypatch.setattr(make_traces, "load_sampler", lambda *_: (guesser, Letters()))
    flags = ["--free", "--cpu", "--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    make_traces.main(flags, DEV_QUESTIONS=2)
    assert guesser.asked == {f"第{i}题？" for i in range(8)}
    learnable = str(tmp_path / "out" / "learnable")
    for split, numbers in (("train", range(8)), ("validation", (8, 9)), ("test", (20, 21))):
        assert pairs_of(load_questions(learnable, split)) == [(f"第{i}题？", 72) for i in numbers]
    for mine, theirs in zip(load_splits(learnable, 200), load_splits(str(tmp_path / "data"), 2), strict=True):
        assert mine.to_list() == theirs.to_list()
