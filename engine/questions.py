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

if TYPE_CHECKING:  # imported where it is used: `--help` and the one-line errors need no second to start
    from datasets import Dataset, DatasetDict

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # of files, by their ending
TEST_SHARE = 0.1  # of a single file's rows, its last ones, are the test split
LARGEST_ANSWER = 10**15  # beyond it a label that some reader made a float is no longer exact


def to_prompt(question: str, system: str | None = None) -> list[dict]:
    """The messages for one question. Without `system` the model's chat template adds the prompt of its training.

    A plain string would get no chat template in TRL, and its answers would never end.
    """
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": question}]


def to_row(question: str, answer: int) -> dict:
    """A line of a data set folder's train.jsonl or test.jsonl."""
    return {prompts.QUESTION_COLUMN: question, prompts.ANSWER_COLUMN: answer}


def read_splits(dataset: str) -> dict[str, Dataset]:
    """The splits of a hub id, of a local folder (save_to_disk, parquet, JSON lines, CSV) or of a single file.

    What exists here is read as what it is, whatever its name. The last tenth of a single file is its `test` split and
    the rest `train`, for every script: what is trained on a file is measured on other questions.

    Raises:
        UserError: a data set that cannot be read.
    """
    from datasets import DatasetDict, disable_progress_bars, logging
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    refuse_missing_folder(dataset, "the data set")
    path = Path(dataset)
    if path.is_file() and path.suffix.lower() not in READERS:
        raise UserError(f"the data set {dataset!r} is no {', '.join(READERS)} file and no folder; pass one of these")
    if not path.exists() and (path.suffix.lower() in READERS or dataset in _PACKAGED_DATASETS_MODULES):
        raise UserError(f"the data set: there is no file or folder {dataset!r}; mend the path, or pass a hub id")
    disable_progress_bars()  # reading and filtering take a moment; a download still shows its own
    logging.set_verbosity(logging.CRITICAL)  # what a reader logs about an error is said below
    try:
        data = read_all(path) if path.exists() else read_configuration(dataset)
        if path.is_file():
            data = data.train_test_split(test_size=TEST_SHARE, shuffle=False)
        splits = dict(data) if isinstance(data, DatasetDict) else {}
        for rows in splits.values():
            rows[:]  # JSON lines that are not UTF-8 raise here and no sooner
    except UserError:
        raise
    except Exception as error:  # the hub's and the readers' errors have no common base class
        where, fault, remedy = "folder" if path.is_dir() else "file", fault_in(path, error), "Mend it there"
        if not path.exists():
            where, remedy = "hub id", "Set HF_ENDPOINT=https://hf-mirror.com where the hub is unreachable"
        raise UserError(
            f"cannot load the data set {dataset!r} ({where}): {fault}. {remedy}, or pass a local folder with --dataset"
        ) from error
    return splits


def read_split(dataset: str, split: str) -> Dataset:
    """One of the splits. Raises UserError where there is none of that name."""
    splits = read_splits(dataset)
    if split not in splits:
        has = ", ".join(splits) or "no named splits"
        raise UserError(f"the data set {dataset!r} has no split {split!r} (it has: {has}); it needs 'train' and 'test'")
    if Path(dataset).is_file():
        count, part = sum(map(len, splits.values())), "last" if split == "test" else "first"
        note(
            f"{dataset!r} is a single file: its {part} {len(splits[split])} of {count} rows are its {split} split; "
            "pass a folder with a train and a test file to split them otherwise"
        )
    return splits[split]


def read_all(path: Path) -> Dataset | DatasetDict:
    """All splits of a folder, or the rows of a file; parsed anew each time, for the readers' cache goes by dates."""
    from datasets import load_dataset, load_from_disk
    from datasets.data_files import get_data_patterns

    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return load_from_disk(path)
    whole = str(path.resolve())  # `json` alone would be the reader of that name, over the working directory
    literal = glob.escape(whole)  # the readers take what they get for a pattern
    with tempfile.TemporaryDirectory() as cache:
        options = {"cache_dir": cache, "keep_in_memory": True}
        if path.is_file():
            return load_dataset(READERS[path.suffix.lower()], data_files=literal, split="train", **options)
        if literal != whole:
            found = get_data_patterns(literal).items()
            options["data_files"] = {split: [f"{literal}/{each}" for each in patterns] for split, patterns in found}
        return read_configuration(whole, **options)


def read_configuration(name: str, **options) -> Dataset | DatasetDict:
    """All splits of a hub id or a folder; of several configurations without a default the one called `main`."""
    from datasets import get_dataset_config_names, load_dataset

    try:
        return load_dataset(name, **options)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
        names = get_dataset_config_names(name)
        said = f"the data set {name!r} has the configurations {', '.join(names)}"
        if "main" not in names:
            save = f"load_dataset({name!r}, {names[0]!r}).save_to_disk(FOLDER)"
            raise UserError(f"{said}, none called 'main'; save one by {save} and pass that folder") from error
        note(f"{said}: 'main' is read")
        return load_dataset(name, "main", **options)


def fault_in(path: Path, error: BaseException) -> str:
    """What an error of the readers says, and of which local file it does, or in what its files differ."""
    from datasets.exceptions import DatasetGenerationError

    chain = [error]
    while inside := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inside)
    told = next((each for each in chain if not isinstance(each, DatasetGenerationError)), error)
    said = f"{type(told).__name__}: {str(told).rstrip('.')}"
    if any(isinstance(each, UnicodeDecodeError) for each in chain):
        said = f"it is not UTF-8, save it as that ({said})"
    columns: dict[str, str] = {}
    for file in sorted(each for each in path.rglob("*") if each.suffix.lower() in READERS):  # none of a hub id
        try:
            rows = read_all(file)
            rows[:]
            kinds = {name: getattr(kind, "dtype", "nested") for name, kind in rows.features.items()}
            columns.setdefault(str(kinds), file.name)
        except Exception as fault:
            if fault_in(file, fault) == said:
                return f"{file.name}: {said}"
    if told is not error and len(columns) > 1:
        return f"its files differ: {', '.join(f'{name} has {kinds}' for kinds, name in columns.items())}"
    return said


def load_questions(dataset: str, split: str, unlabelled: bool = False) -> Dataset:
    """A checked split with the columns `prompt` (messages) and `answer` (int), each question once.

    A repeated row is dropped. Where labels of one question differ, at most one can be right and nobody knows which:
    all its rows are dropped. Both are said in a line.

    Args:
        unlabelled: take rows without a label too; their `answer` is None and their system prompt OPEN_SYSTEM_PROMPT.

    Raises:
        UserError: an unreadable data set, a missing split or column, an empty split, a row without a question
            or with a label that is not an integer.
    """
    from datasets import Dataset

    rows = read_split(dataset, split)
    tidy = {name: name.replace("\ufeff", "").strip() for name in rows.column_names}  # of a CSV's header
    if len(set(tidy.values())) == len(tidy):
        rows = rows.rename_columns(tidy)
    question_column, answer_column = prompts.QUESTION_COLUMN, prompts.ANSWER_COLUMN
    where = f"the data set {dataset!r}, split {split!r}"
    for column in (question_column, answer_column):
        if column not in rows.column_names:
            raise UserError(
                f"{where} has no column {column!r} (it has: {', '.join(rows.column_names)}); "
                "rename it there, or edit QUESTION_COLUMN / ANSWER_COLUMN in prompts.py"
            )
    if len(rows) == 0:
        raise UserError(f"{where} is empty; give it rows, or pass another --dataset")
    labels: dict[str, int | None] = {}
    contradicted = set()
    for index, (question, answer) in enumerate(zip(rows[question_column], rows[answer_column], strict=True)):
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}, row {index}: {question_column} is {question!r}, not a question; fill or drop it")
        if not (answer is None and unlabelled or is_label(answer) and abs(answer) < LARGEST_ANSWER):
            open_question = " (questions without a label: train only, with REWARD_MODEL)" if answer is None else ""
            raise UserError(
                f"{where}, row {index}: {answer_column} is {answer!r}, not an integer below {LARGEST_ANSWER:.0e}; "
                f"mend or drop it{open_question}"
            )
        if labels.setdefault(question, None if answer is None else int(answer)) != answer:
            contradicted.add(question)
    if contradicted:
        first = next(question for question in labels if question in contradicted)
        note(f"{where}: {len(contradicted)} questions with two different labels dropped, the first is {first!r}")
    if len(labels) < len(rows):
        note(f"{where}: {len(rows) - len(labels)} rows dropped that repeat a question")
    kept = {question: label for question, label in labels.items() if question not in contradicted}
    if not kept:
        raise UserError(f"{where} has no usable row; pass another --dataset")
    asked = [to_prompt(question, prompts.OPEN_SYSTEM_PROMPT if kept[question] is None else None) for question in kept]
    return Dataset.from_dict({"prompt": asked, "answer": list(kept.values())})


def pairs_of(questions: Dataset) -> list[tuple[str, int | None]]:
    """The question and the label of each row of `load_questions`."""
    asked = (prompt[-1]["content"] for prompt in questions["prompt"])
    return list(zip(asked, questions["answer"], strict=True))


def load_splits(dataset: str, dev: int, unlabelled: bool = False) -> tuple[Dataset, Dataset, Dataset]:
    """The questions to train on, the development questions, and the test questions, as `load_questions` gives them.

    The development questions are the split `validation` where there is one. Else they are the last `dev` questions of
    `train` that have a label, but at most a fifth of these. What is trained on is asked in no other split.

    Raises:
        UserError: as in `load_questions`, or there are no questions left to train on or to develop with.
    """
    train, test = load_questions(dataset, "train", unlabelled), load_questions(dataset, "test")
    tested = {question for question, _ in pairs_of(test)}
    if shared := [question for question, _ in pairs_of(train) if question in tested]:
        note(f"{len(shared)} training questions dropped that the test split asks too, the first is {shared[0]!r}")
        train = train.select([index for index, (question, _) in enumerate(pairs_of(train)) if question not in tested])
    if "validation" in read_splits(dataset):
        dev_set = load_questions(dataset, "validation")
    else:
        labelled = [index for index, label in enumerate(train["answer"]) if label is not None]
        dev_set = train.select(labelled[len(labelled) - min(dev, len(labelled) // 5) :])
    held_out = {question for question, _ in pairs_of(dev_set)}
    kept = [index for index, (question, _) in enumerate(pairs_of(train)) if question not in held_out]
    if not kept or not len(dev_set):
        raise UserError(
            f"the data set {dataset!r} has {len(kept)} training questions that the test split does not ask, and "
            f"{len(dev_set)} development questions, a fifth of them; give it more, or pass another --dataset"
        )
    return train.select(kept), dev_set, test


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
