"""Traces: a model's answers, rewritten into the format and filtered; and the files that hold them."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from engine.console import UserError, first_line, note
from engine.folder import write_text
from engine.numbers import chinese_share, extract_answer, find_numbers, is_label, parse_number
from engine.questions import to_row
from engine.templates import count_tokens
from rewards import correctness_reward, hard_format_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ----------------------------------------------------------------------------------------- text -> thinking, number
# A box, with the signs of its formula if the formula holds nothing else. Braces inside it may be nested once, as in
# \boxed{\text{18 美元}}. No part can match in two ways, so the search is linear: model output is untrusted.
_BOX = re.compile(
    r"(?P<open>(?:\\\[|\\\(|\$\$?)\s*)?\\boxed\{(?P<inside>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}(?(open)\s*(?:\\\]|\\\)|\$\$?))"
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def rewrite(text: str) -> tuple[str, Decimal | None]:
    """The thinking of a completion in any form, and the number that it answers, or None.

    The number is that of the answer block; without a block, that of the last box; without a box, the last number. If
    there is a `</think>`, the box or number must stand behind it; an R1-style teacher's `<think>` is in its prompt.
    """
    thinking, closed, rest = text.partition("</think>")
    said, answered = rest if closed else text, extract_answer(text)
    boxes = list(_BOX.finditer(said))
    if answered is not None:
        number = parse_number(answered)
        thinking = thinking if closed else text.partition("<answer>")[0]
    elif boxes:
        number = parse_number(boxes[-1]["inside"])
        if not closed:  # the paragraph of the box ends the thinking
            end = boxes[-1].end()
            thinking = text[:end] + text[end:].partition("\n\n")[0]
    else:
        number = (find_numbers(said) or [None])[-1]
    return tidy(thinking.strip().removeprefix("<think>")), number


def tidy(thinking: str) -> str:
    """Replace boxes by their content, and cut off announcements of the answer, which the answer block will hold."""
    thinking = _BOX.sub(lambda box: " ".join(_TEXT.sub(r"\1", box["inside"]).split()), thinking).strip()
    for _ in range(3):  # at the end, such as `**答案**`, `答案是：`, and the number on a line of its own
        start = 1 + max(thinking.rstrip("。：:").rfind(end) for end in "。！？\n")
        last = thinking[start:]
        bare = not chinese_share(last, "") and len(find_numbers(last)) == 1
        if "=" in last or not (bare or "答案" in last and len(last) <= 30):
            break
        thinking = thinking[:start].rstrip()
    return thinking


def to_trace(thinking: str, label: int) -> str:
    """The completion that earns every reward."""
    return f"<think>\n{thinking}\n</think>\n<answer>\n{label}\n</answer>"


# ------------------------------------------------------------------------------------------------------- the filters
def fault_of(thinking: str, question: str, label: int, recipe: SimpleNamespace) -> str | None:
    """Why the thinking of a right answer is not kept; None if it is."""
    if len(thinking) < recipe.MIN_THINKING:
        return "too short"
    if "```" in thinking:
        return "code block"
    if max(map(len, thinking.split("\n"))) > recipe.MAX_PARAGRAPH:
        return "long paragraph"
    if chinese_share(thinking, question) < recipe.MIN_CHINESE:
        return "mixed languages"
    # A guess neither computes the label nor names it at least twice more than the question does.
    results = [find_numbers(part)[:1] for part in thinking.split("=")[1:]]
    said = find_numbers(thinking).count(label) - find_numbers(question).count(label)
    if [label] not in results and said < 2:
        return "not computed"
    trace = [[{"role": "assistant", "content": to_trace(thinking, label)}]]
    if not (hard_format_reward(trace)[0] and correctness_reward(trace, [label])[0]):
        return "stray tags"
    return None


def judge(question: str, label: int, samples: list[dict], recipe: SimpleNamespace) -> dict:
    """Judge the samples of a question, each `{"text", "ended"}`, where `ended` is False if it was cut off.

    Returns the question's line in questions.jsonl:
    `{"question", "label", "right": how many, "samples": [{"text", "ended", "fault"}], "kept": [completions]}`.
    """
    judged, kept, paths, right = [], [], [], 0
    for text, ended in ((each["text"], each["ended"]) for each in samples):
        thinking, number = rewrite(text) if ended else ("", None)
        if number is None:
            fault = "no number" if ended else "cut off"
        elif number != label:
            fault = "wrong"
        else:
            right += 1
            fault = fault_of(thinking, question, label, recipe)
            numbers = find_numbers(thinking)
            if fault is None and numbers in paths:
                fault = "same numbers"  # the same reasoning in other words
            elif fault is None and len(kept) == recipe.KEEP:
                fault = "enough kept"
            elif fault is None:
                paths.append(numbers)
                kept.append(to_trace(thinking, label))
        judged.append({"text": text, "ended": ended, "fault": fault})
    return {"question": question, "label": label, "right": right, "samples": judged, "kept": kept}


# --------------------------------------------------------------------------------------------------------- the files
def write_lines(path: Path, rows: list[dict]) -> None:
    """Write the rows as JSON lines, completely or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_data(folder: Path, **splits: list[tuple[str, int]]) -> None:
    """Write a data set folder, the splits in the given order: questions with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        write_lines(folder / f"{split}.jsonl", [to_row(text, label) for text, label in pairs])


def append_lines(path: Path, rows: list[dict]) -> None:
    """Append JSON lines, and wait until they are on the disk. A kill may cut the last one; `read_log` drops it."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def open_folder(output: Path, settings: dict) -> None:
    """Record the settings in a new folder, or check that its samples were drawn with the same settings.

    Settings of a run without samples are replaced. Weights are compared only where both are known: those of a hub id
    are not. Raises UserError if the settings differ or the folder cannot be read.
    """
    path, log = output / "settings.json", output / "questions.jsonl"
    try:
        sampled = path.exists() and log.exists() and log.stat().st_size > 0
        old = dict(json.loads(path.read_bytes())) if sampled else settings
        for name in settings:
            unknown = name == "weights" and None in (old.get(name), settings[name])
            if old.get(name) != settings[name] and not unknown:
                raise UserError(
                    f"the samples in {str(output)!r} were drawn with {name} {old.get(name)!r}, and now it is "
                    f"{settings[name]!r}; change it back, or name another --output"
                )
        write_lines(path, [settings | {"weights": settings["weights"] or old.get("weights")}])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--output {str(output)!r} cannot be used: {first_line(error)}; name another folder") from error


def read_log(path: Path, asked: list[tuple[str, int]], recipe: SimpleNamespace) -> list[dict]:
    """The questions that were sampled already, judged again with the filters of `recipe`.

    Raises UserError if the file is damaged, or if its questions are not the first of `asked`.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        rows = [judge(row["question"], row["label"], row["samples"], recipe) for row in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({first_line(error)}); name another --output") from error
    if [(row["question"], row["label"]) for row in rows[: len(asked)]] != asked[: len(rows)]:
        raise UserError(f"{str(path)!r} holds other questions than the data set does; name another --output")
    if len(rows) > len(asked):
        raise UserError(
            f"{str(path)!r} holds {len(rows)} questions, more than the {len(asked)} asked now, and none is dropped; "
            f"let --questions end {len(rows) - len(asked)} later, or name another --output"
        )
    return rows


def write_learnable(folder: Path, rows: list[dict], dev: list, test: list, recipe: SimpleNamespace) -> str:
    """Write a data set for train_grpo.py: the learnable questions, with the development and the test questions.

    A question is learnable if some samples are right and others wrong: the rewards in its group then differ.

    Args:
        rows: what `judge` returned for each question.
        dev, test: the development and the test questions, each with its label.

    Returns:
        A line that says what was written, or why nothing was.
    """
    train = [(row["question"], row["label"]) for row in rows if recipe.MIN_RIGHT <= row["right"] < recipe.SAMPLES]
    which = f"right {recipe.MIN_RIGHT} to {recipe.SAMPLES - 1} times of {recipe.SAMPLES}"
    if not train:
        (folder / "train.jsonl").unlink(missing_ok=True)  # from an earlier call with another MIN_RIGHT
        return f"none: no question {which}"
    write_data(folder, test=test, validation=dev, train=train)
    return f"{folder}: {len(train)} questions {which}"


# --------------------------------------------------------------------------------- files -> rows for fine-tuning
def read_rows(file: str, flag: str, convert: Callable[[dict], dict]) -> list[dict]:
    """The lines of a file that `flag` names as `{"prompt": [messages], "completion": [one assistant's message]}`.

    `convert` is `from_trace` or `from_conversation`. Raises UserError if the file is missing, empty or not UTF-8, or if
    a line has another format.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file!r} is not UTF-8: {first_line(error)}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file!r} cannot be read: {first_line(error)}; name another file") from error
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(convert(json.loads(line)))
            except UnicodeEncodeError:
                broken.append(number)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{flag} {file!r}, line {number}: {first_line(error)}; mend or drop it") from error
    if broken:
        note(f"{flag}: {len(broken)} lines dropped that hold half a surrogate pair, the first is line {broken[0]}")
    if not rows:
        raise UserError(f"{flag} {file!r} is empty; name another file")
    return rows


def from_trace(line: dict) -> dict:
    """A row from a line of make_traces.py or one like it. Its prompt is not changed."""
    prompt, completion = messages_of(line, "prompt"), messages_of(line, "completion")
    if prompt[-1]["role"] != "user" or [message["role"] for message in completion] != ["assistant"]:
        raise ValueError("not a prompt that ends with the user and a completion of one assistant's message")
    if line.get("answer") is not None and not is_label(line["answer"]):
        raise ValueError(f"answer is {line['answer']!r}, not an integer")
    return {"prompt": prompt, "completion": completion}


def from_conversation(line: dict) -> dict:
    """A row from a conversation. Its last assistant's message is the completion, all messages before are the prompt.

    Without a system turn it gets a plain one. Else the chat template would add our prompt, which asks for a number.
    """
    messages = messages_of(line, "messages")
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise ValueError("no assistant's message that answers a user's")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def messages_of(line: dict, name: str) -> list[dict]:
    """The messages under `name`, reduced to role and content. Raises ValueError if they are not as expected."""
    messages = line.get(name) if isinstance(line, dict) else None
    roles = ("system", "user", "assistant")
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"no list of messages under {name!r}")
    for message in messages:
        if not (isinstance(message, dict) and message.get("role") in roles and isinstance(message.get("content"), str)):
            raise ValueError(f"a message under {name!r} without a text as content or a role of {', '.join(roles)}")
        message["content"].encode()  # half a surrogate pair, which no tokenizer takes, raises UnicodeEncodeError
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def keep_usable(
    rows: list[dict], flag: str, tokenizer: PreTrainedTokenizerBase, held_out: set[str], recipe: SimpleNamespace
) -> list[dict]:
    """The rows that are short enough and not about a question of `held_out`. A note counts the others.

    Raises UserError if no row is left.
    """
    limits = f"longer than MAX_TOKENS {recipe.MAX_TOKENS} or MAX_COMPLETION_TOKENS {recipe.MAX_COMPLETION_TOKENS}"
    dropped, kept = {limits: 0, "on test or development questions": 0}, []
    for row, (prompt, completion) in zip(rows, count_tokens(tokenizer, rows), strict=True):
        if prompt + completion > recipe.MAX_TOKENS or completion > recipe.MAX_COMPLETION_TOKENS:
            dropped[limits] += 1
        elif row["prompt"][-1]["content"] in held_out:
            dropped["on test or development questions"] += 1
        else:
            kept.append(row)
    said = ", ".join(f"{count} {why}" for why, count in dropped.items() if count)
    if not kept:
        raise UserError(f"{flag}: none of {len(rows)} rows can be learned: {said}; raise the limit, or name other rows")
    if said:
        note(f"{flag}: {len(rows) - len(kept)} of {len(rows)} rows dropped: {said}")
    return kept


def draw_mix(conversations: list[dict], traces: int, share: float, seed: int) -> list[dict]:
    """Draw so many conversations at random that they are this share of all rows."""
    wanted = round(traces * share / (1 - share))
    if wanted > len(conversations):
        note(f"--mix: MIX_SHARE {share} asks for {wanted} conversations, there are {len(conversations)}: all are taken")
    return random.Random(seed).sample(conversations, min(wanted, len(conversations)))
