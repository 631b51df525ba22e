"""A data set -> checked questions with labels, and what a model is asked for each."""

from __future__ import annotations

import glob
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import prompts
from engine.console import UserError, note, refuse_missing_folder
from engine.numbers import is_label

if TYPE_CHECKING:  # imported where it is used: `--help` and the one-line errors start without it
    from datasets import Dataset, DatasetDict

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # of files, by their ending
TEST_SHARE = 0.1  # the last rows of a single file are its test split
LARGEST_ANSWER = 10**15  # above it a label that a reader has made a float is not exact any more


def to_prompt(question: str, system: str | None = None) -> list[dict]:
    """The messages for one question. Without `system` the model's chat template adds the prompt of its training."""
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": question}]


def to_row(question: str, answer: int) -> dict:
    """A line of a data set folder's train.jsonl or test.jsonl."""
    return {prompts.QUESTION_COLUMN: question, prompts.ANSWER_COLUMN: answer}


def read_splits(dataset: str) -> dict[str, Dataset]:
    """The splits of a hub id, of a local folder (save_to_disk, parquet, JSON lines, CSV) or of a single file.

    A name that exists here is read from here. The last tenth of a single file is its `test` split and the rest `train`,
    in every script, so a model is tested on other questions than it was trained on. Raises UserError.
    """
    from datasets import DatasetDict, disable_progress_bars, logging

    refuse_missing_folder(dataset, "the data set")
    path = Path(dataset)
    if path.is_file() and path.suffix.lower() not in READERS:
        raise UserError(f"the data set {dataset!r} is no {', '.join(READERS)} file and no folder; pass one of these")
    if not path.exists() and path.suffix.lower() in READERS:
        raise UserError(f"the data set: there is no file {dataset!r}; mend the path, or pass a hub id")
    disable_progress_bars()  # except those of downloads
    logging.set_verbosity(logging.CRITICAL)  # the message below says what readers log about an error
    try:
        data = read_local(path) if path.exists() else read_named(dataset)
        if path.is_file():
            data = data.train_test_split(test_size=TEST_SHARE, shuffle=False)
    except Exception as error:  # the hub's and the readers' errors have no common base class
        where, remedy = "folder" if path.is_dir() else "file", "mend it there"
        if not path.exists():
            where, remedy = "hub id", "set HF_ENDPOINT=https://hf-mirror.com where the hub is unreachable"
        raise UserError(
            f"cannot load the data set {dataset!r} ({where}): {fault_in(path, error)}; {remedy}, or pass another "
            "--dataset"
        ) from error
    if path.is_file():
        note(f"{dataset!r} is a single file: its last {len(data['test'])} rows are the test split, the rest is train")
    return dict(data) if isinstance(data, DatasetDict) else {}


def read_local(path: Path) -> Dataset | DatasetDict:
    """The splits of a folder, or the rows of a file."""
    from datasets import load_dataset, load_from_disk
    from datasets.data_files import get_data_patterns

    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return load_from_disk(path)
    whole = str(path.resolve())  # whole, because a bare `json` is the name of a reader
    literal = glob.escape(whole)  # the readers take *, ? and [ for a pattern
    for file in data_files(path):
        if file.suffix.lower() != ".parquet":
            file.read_text(encoding="utf-8")  # not every reader notices another encoding
    with tempfile.TemporaryDirectory() as cache:  # an own one: the usual cache misses changes that keep a file's date
        options = {"cache_dir": cache, "keep_in_memory": True}
        if path.is_file():
            return load_dataset(READERS[path.suffix.lower()], data_files=literal, split="train", **options)
        if literal != whole:
            found = get_data_patterns(literal).items()
            options["data_files"] = {split: [f"{literal}/{each}" for each in patterns] for split, patterns in found}
        return read_named(whole, **options)


def read_named(name: str, **options) -> Dataset | DatasetDict:
    """The splits of a hub id or a folder; of several configurations without a default the one called `main`."""
    from datasets import get_dataset_config_names, load_dataset

    try:
        return load_dataset(name, **options)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
    data = load_dataset(name, "main", **options)  # without one its error names those that there are
    note(f"the data set {name!r} has the configurations {', '.join(get_dataset_config_names(name))}: 'main' is read")
    return data


def data_files(path: Path) -> list[Path]:
    """The files of a local data set that there is a reader for."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in files if file.suffix.lower() in READERS]


def fault_in(path: Path, error: BaseException) -> str:
    """What an error of the readers says in one line, and of which file in a folder it says that."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    said = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    if isinstance(error, UnicodeDecodeError):
        said = f"it is not UTF-8, save it as UTF-8 ({error})"
    for file in data_files(path) if path.is_dir() else ():
        try:
            read_local(file)
        except Exception as alone:
            if fault_in(file, alone) == said:
                return f"{file.name}: {said}"
    return said


def load_questions(dataset: str, split: str, unlabelled: bool = False) -> Dataset:
    """A checked split of a data set: `read_splits` and `check_split` in one."""
    return check_split(read_splits(dataset), dataset, split, unlabelled)


def check_split(splits: dict[str, Dataset], dataset: str, split: str, unlabelled: bool = False) -> Dataset:
    """A checked split with the columns `prompt` (messages) and `answer` (int), each question once.

    Repeated rows are dropped. Where a question has different labels, all its rows are dropped. A note says so.

    Args:
        splits: what `read_splits` returned for `dataset`.
        unlabelled: take rows without a label too. Their `answer` is None, their system prompt OPEN_SYSTEM_PROMPT.

    Raises:
        UserError: a missing split or column, an empty split, a row without a question or with a label that is not an
            integer.
    """
    from datasets import Dataset

    if split not in splits:
        has = ", ".join(splits) or "no named splits"
        raise UserError(f"the data set {dataset!r} has no split {split!r} (it has: {has}); it needs 'train' and 'test'")
    rows, where = splits[split], f"the data set {dataset!r}, split {split!r}"
    rows = rows.rename_columns({name: name.replace("\ufeff", "").strip() for name in rows.column_names})  # as in CSV
    question_column, answer_column = prompts.QUESTION_COLUMN, prompts.ANSWER_COLUMN
    for column in (question_column, answer_column):
        if column not in rows.column_names:
            raise UserError(
                f"{where} has no column {column!r} (it has: {', '.join(rows.column_names)}); "
                "rename it there, or edit QUESTION_COLUMN / ANSWER_COLUMN in prompts.py"
            )
    labels: dict[str, int | None] = {}
    contradicted = set()
    for index, (question, answer) in enumerate(zip(rows[question_column], rows[answer_column], strict=True)):
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}, row {index}: {question_column} is {question!r}, not a question; fill or drop it")
        if not (answer is None and unlabelled or is_label(answer) and abs(answer) < LARGEST_ANSWER):
            raise UserError(
                f"{where}, row {index}: {answer_column} is {answer!r}, not an integer below {LARGEST_ANSWER:.0e}; mend "
                "or drop it (questions without a label: in train only, with REWARD_MODEL)"
            )
        if labels.setdefault(question, None if answer is None else int(answer)) != answer:
            contradicted.add(question)
    if len(labels) < len(rows):
        note(f"{where}: {len(rows) - len(labels)} rows dropped that repeat a question")
    if contradicted:
        count, one = len(contradicted), min(contradicted)
        note(f"{where}: {count} questions with two different labels dropped, such as {one!r}")
    kept = {question: label for question, label in labels.items() if question not in contradicted}
    if not kept:
        raise UserError(f"{where} has no usable row; give it some, or pass another --dataset")
    asked = [to_prompt(question, prompts.OPEN_SYSTEM_PROMPT if kept[question] is None else None) for question in kept]
    return Dataset.from_dict({"prompt": asked, "answer": list(kept.values())})


def pairs_of(questions: Dataset) -> list[tuple[str, int | None]]:
    """The question and the label of each row of `load_questions`."""
    asked = (prompt[-1]["content"] for prompt in questions["prompt"])
    return list(zip(asked, questions["answer"], strict=True))


def leave_out(questions: Dataset, others: Dataset) -> Dataset:
    """The questions that are not among the others."""
    taken = {question for question, _ in pairs_of(others)}
    return questions.select([i for i, (question, _) in enumerate(pairs_of(questions)) if question not in taken])


def load_splits(dataset: str, dev: int, unlabelled: bool = False) -> tuple[Dataset, Dataset, Dataset]:
    """The questions to train on, the development questions, and the test questions, as `check_split` returns them.

    The development questions are the split `validation` where there is one. Else they are the last `dev` questions of
    `train` that have a label, but at most a fifth of these. No training question is in another split.

    Raises:
        UserError: as in `read_splits` and `check_split`, or nothing is left to train on or to develop with.
    """
    splits = read_splits(dataset)
    train, test = check_split(splits, dataset, "train", unlabelled), check_split(splits, dataset, "test")
    untested = leave_out(train, test)
    if shared := len(train) - len(untested):
        note(f"{shared} training questions dropped that are in the test split too")
    if "validation" in splits:
        dev_set = check_split(splits, dataset, "validation")
    else:
        labelled = [index for index, label in enumerate(untested["answer"]) if label is not None]
        dev_set = untested.select(labelled[len(labelled) - min(dev, len(labelled) // 5) :])
    train = leave_out(untested, dev_set)
    if not len(train) or not len(dev_set):
        raise UserError(
            f"the data set {dataset!r} has {len(train)} training questions that are in no other split, and "
            f"{len(dev_set)} development questions, a fifth of them; give it more, or pass another --dataset"
        )
    return train, dev_set, test


def first_of(questions: Dataset, count: int) -> Dataset:
    """The first `count` of them, or all of them where `count` is -1."""
    return questions if count == -1 else questions.select(range(min(count, len(questions))))


def slice_of(text: str | None) -> slice:
    """What `--questions FROM:TO` selects, where each end may be left out; all where the flag was not given.

    Raises:
        UserError: the text is no such range, or there is nothing in it.
    """
    if text is None:
        return slice(None)
    found = re.fullmatch(r"([0-9]{0,9}):([0-9]{0,9})", text)
    first, end = (int(part) if part else None for part in found.groups()) if found else (0, 0)
    if not found or end is not None and end <= (first or 0):
        raise UserError(f"--questions {text!r} is no FROM:TO such as 0:400, :400 or 400:; the first question is 0")
    return slice(first, end)
