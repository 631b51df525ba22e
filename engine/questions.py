"""A data set -> checked questions with labels, and what a model is asked for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import prompts
from engine.console import UserError, note, refuse_missing_folder
from engine.numbers import is_label

if TYPE_CHECKING:  # imported where it is used: `--help` and the one-line errors need no second to start
    from datasets import Dataset

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


def read_split(dataset: str, split: str) -> Dataset:
    """One split of a hub id or of a local folder (save_to_disk, parquet, JSON lines). Raises UserError."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    refuse_missing_folder(dataset, "the data set")
    disable_progress_bars()  # of reading and filtering, which take a moment; a download still shows its own
    folder = Path(dataset)
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        data = load_from_disk(dataset) if saved else load_dataset(dataset)
    except Exception as error:  # the hub's and the readers' errors have no common base class
        where = "folder" if folder.is_dir() else "hub id"
        raise UserError(
            f"cannot load the data set {dataset!r} ({where}): {type(error).__name__}: {str(error).rstrip('.')}. "
            "Pass a local folder with --dataset, or set HF_ENDPOINT=https://hf-mirror.com where the hub is unreachable"
        ) from error
    if not isinstance(data, DatasetDict) or split not in data:
        has = ", ".join(data) if isinstance(data, DatasetDict) else "no named splits"
        raise UserError(f"the data set {dataset!r} has no split {split!r} (it has: {has}); it needs 'train' and 'test'")
    return data[split]


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


def load_splits(dataset: str, dev: int, unlabelled: bool = False) -> tuple[Dataset, Dataset, Dataset]:
    """The questions to train on, the development questions, and the test questions, as `load_questions` gives them.

    The development questions are the last `dev` training questions with a label, but at most a fifth of these. Where
    the data set has a split `validation`, they are that split, and all training questions are trained on.

    Raises:
        UserError: as in `load_questions`, or too few questions with a label.
    """
    train, test = load_questions(dataset, "train", unlabelled), load_questions(dataset, "test")
    if has_split(dataset, "validation"):
        return train, load_questions(dataset, "validation"), test
    labelled = [index for index, label in enumerate(train["answer"]) if label is not None]
    count = min(dev, len(labelled) // 5)
    if count == 0:
        raise UserError(
            f"the data set {dataset!r} has {len(labelled)} training questions with a label, too few to keep one in five "
            "for development; give it more, or a split 'validation'"
        )
    kept_out = set(labelled[-count:])
    return train.select([i for i in range(len(train)) if i not in kept_out]), train.select(sorted(kept_out)), test
