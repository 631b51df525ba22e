r"""Let a model answer training questions and keep what is right and readable: traces that train_sft.py learns from.

The rejection sampling of DeepSeek-R1 (arXiv 2501.12948, stage 3): several answers a question; those that end in the
label are rewritten into the two blocks of the format, and mixed languages, long paragraphs and code blocks fall.

    python make_traces.py --model output       # what train_grpo.py saved: the data of R1's second fine-tuning
    python make_traces.py --example            # a cold start: asked behind WORKED_EXAMPLE of prompts.py (few-shot)
    python make_traces.py --free               # another: asked for a \boxed{}, it reasons as it always has
    python make_traces.py --free --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B    # distillation, on a card of 24 GB
    python make_traces.py --demo               # the demo's model and problems, any machine

`traces.jsonl` in the output folder holds a line for every kept trace: prompt, completion, answer. `questions.jsonl`
holds a line for every question: its label, all samples and why each fell, how many were right, the traces kept.
`sifted` is a data set of those that are right now and then, `train_grpo.py --dataset output/traces/sifted`: their
groups have spread. The same command goes on where it was stopped, with a higher --limit to more questions; with
another filter it judges anew what was sampled, without a model. A trained model is asked under its own prompt; the
traces are written under that of prompts.py however they were asked for: so what a model can do behind an example can
be taught to one that is asked without.
"""

import argparse
import json
import os
import random
import re
import sys
import time
from collections import Counter
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import train_grpo
from engine import pretraining
from engine.console import UserError, check_ranges, check_types, constants_of, first_line, note, run
from engine.numbers import chinese_share, extract_answer, find_numbers, parse_number
from engine.questions import load_questions, prompt_of, to_conversation, to_row
from prompts import WORKED_EXAMPLE
from rewards import correctness_reward, hard_format_reward

if TYPE_CHECKING:  # imported where they are used: the one-line errors need no seconds to start
    from transformers import PreTrainedTokenizerBase

    from engine.rollout import PlainSampler, Sampler

# ---------------------------------------------------------------------------------------------------- the sampling
OUTPUT_DIR: str = "output/traces"  # --output
SAMPLES: int = 8  # answers a question, 1 or more; more find traces for harder questions, time grows with them
TEMPERATURE: float = 0.8  # above 0; lower is right more often, higher differs more
QUESTIONS: int = 16  # asked at a time: 128 answers, whose keys and values take 5 GB beside the 15 GB of a 7B teacher
SOMETIMES: int = 2  # right answers, but not all, that take a question into `sifted`; 1 of 8 is mostly luck
FREE_PROMPT: str = "请一步一步推理，最后把答案写在 \\boxed{} 里"  # behind the question, under --free

# -------------------------------------------------------------------------------- the filters, each on the thinking
KEEP: int = 4  # traces a question, the first drawn; the shortest would teach short thinking, all mostly easy questions
MIN_THINKING: int = 20  # characters; what is shorter is a guess
MAX_PARAGRAPH: int = 400  # characters of a line; nobody reads longer ones
MIN_CHINESE: float = 0.95  # share of its letters, up to 1; 0.95 lets one English word of six letters pass in 120


# ----------------------------------------------------------------------------------------- text -> thinking, number
# A box, and the formula signs around it if it is all of the formula; braces inside it may be nested once, as in
# \boxed{\text{18 美元}}. No part can match in two ways, so that the search is linear: model output is untrusted.
_BOX = re.compile(
    r"(?P<open>(?:\\\[|\\\(|\$\$?)\s*)?\\boxed\{(?P<inside>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}(?(open)\s*(?:\\\]|\\\)|\$\$?))"
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def rewrite(text: str) -> tuple[str, Decimal | None]:
    """A completion in whatever form -> its thinking, and the number that it answers or None.

    What counts is the answer block; without one the last box, of an R1-style teacher the last behind `</think>` (its
    `<think>` stood in the prompt); without a box the last number.
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
    """Boxes opened, and the announcement of the answer cut off the end: the answer block says it."""
    thinking = _BOX.sub(lambda box: " ".join(_TEXT.sub(r"\1", box["inside"]).split()), thinking).strip()
    for _ in range(3):  # such as `**答案**`, `答案是：`, and the number on a line of its own
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


# ------------------------------------------------------------------------------------------------- what is kept, why
def fault_of(thinking: str, question: str, label: int) -> str | None:
    """What is wrong with the thinking of a right answer; None where nothing is."""
    if len(thinking) < MIN_THINKING:
        return "too short"
    if "```" in thinking:
        return "code block"
    if max(map(len, thinking.split("\n"))) > MAX_PARAGRAPH:
        return "long paragraph"
    if chinese_share(thinking, question) < MIN_CHINESE:
        return "mixed languages"
    results = [find_numbers(part)[:1] for part in thinking.split("=")[1:]]  # a guess falls from the sky instead
    said = find_numbers(thinking).count(label) - find_numbers(question).count(label)  # the question's own are no result
    if [label] not in results and said < 2:
        return "not computed"
    trace = [[{"role": "assistant", "content": to_trace(thinking, label)}]]
    if not (hard_format_reward(trace)[0] and correctness_reward(trace, [label])[0]):
        return "stray tags"
    return None


def judge(question: str, label: int, samples: list[dict]) -> dict:
    """The line of a question in questions.jsonl.

    Args:
        samples: `{"text", "ended"}` of each, in the order drawn; `ended` is False where the length cut it off.

    Returns:
        `{"question", "label", "right": how many, "samples": [{"text", "ended", "fault"}], "kept": [completions]}`
    """
    judged, kept, paths, right = [], [], set(), 0
    for text, ended in ((each["text"], each["ended"]) for each in samples):
        thinking, number = rewrite(text) if ended else ("", None)
        if number is None or number != label:
            fault = "cut off" if not ended else "no number" if number is None else "wrong"
        else:
            right += 1
            path = tuple(find_numbers(thinking))  # the same numbers are the same path in other words
            fault = fault_of(thinking, question, label) or ("same numbers" if path in paths else None)
            fault = fault or ("enough kept" if len(kept) == KEEP else None)
            if fault is None:
                paths.add(path)
                kept.append(to_trace(thinking, label))
        judged.append({"text": text, "ended": ended, "fault": fault})
    return {"question": question, "label": label, "right": right, "samples": judged, "kept": kept}


# --------------------------------------------------------------------------------------------------------- the files
def claim(output: Path, settings: dict) -> None:
    """Take a free folder, or one whose samples were drawn with the same settings: two kinds are not mixed.

    A run that ended before its first sample, for want of a network say, binds nobody.
    """
    path, log = output / "settings.json", output / "questions.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
        begun = path.exists() and log.exists() and log.stat().st_size > 0
        old = dict(json.loads(path.read_bytes())) if begun else settings
        for name in settings:
            if old.get(name) != settings[name]:
                raise UserError(
                    f"the samples in {str(output)!r} were drawn with {name} {old.get(name)!r}, and now it is "
                    f"{settings[name]!r}; change it back, or name another --output"
                )
        write(path, [settings])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--output {str(output)!r} cannot be used: {first_line(error)}; name another folder") from error


def read_log(path: Path, asked: list[tuple[str, int]]) -> list[dict]:
    """The questions already sampled, judged by the filters of today; a last line that a kill has torn is dropped."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        rows = [judge(row["question"], row["label"], row["samples"]) for row in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({first_line(error)}); name another --output") from error
    if [(row["question"], row["label"]) for row in rows[: len(asked)]] != asked[: len(rows)]:
        raise UserError(f"{str(path)!r} holds other questions than the data set does; name another --output")
    if len(rows) > len(asked):
        raise UserError(
            f"{str(path)!r} holds {len(rows)} questions, more than the {len(asked)} asked now, and none is dropped; "
            f"pass --limit {len(rows)} or more, or name another --output"
        )
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """All lines or none: readers never meet half a file."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    append(temporary, rows)
    os.replace(temporary, path)


def write_sifted(folder: Path, rows: list[dict], dataset: str) -> str:
    """A data set for train_grpo.py: the questions that are right now and then, and the test split as it is.

    Returns:
        what to say of it.
    """
    train = [(row["question"], row["label"]) for row in rows if SOMETIMES <= row["right"] < SAMPLES]
    try:
        test = load_questions(dataset, "test")
    except UserError as error:  # an hour of sampling is not lost for that
        return f"none: {error}"
    if not train:
        (folder / "train.jsonl").unlink(missing_ok=True)  # of another SOMETIMES
        return f"none: no question right {SOMETIMES} to {SAMPLES - 1} times of {SAMPLES}"
    asked = [prompt[-1]["content"] for prompt in test["prompt"]]
    folder.mkdir(exist_ok=True)
    for split, pairs in (("test", zip(asked, test["answer"], strict=True)), ("train", train)):
        write(folder / f"{split}.jsonl", [to_row(text, label) for text, label in pairs])
    return f"{folder}: {len(train)} questions right {SOMETIMES} to {SAMPLES - 1} times of {SAMPLES}"


def append(path: Path, rows: list[dict]) -> None:
    """Add lines, on the disk when this returns. Raises UserError where that is full; a torn line is no loss."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {str(path)!r}: {first_line(error)}; mend that, and the same command goes on"
        ) from error


# --------------------------------------------------------------------------------------------------------- the model
def load_sampler(name: str, cpu: bool, bf16: bool) -> tuple["Sampler | PlainSampler", "PreTrainedTokenizerBase"]:
    """The model, its weights in bf16 where training autocasts: a 7B one in float32 fits neither 24 GB nor the host."""
    from engine.models import load_model, pick_device
    from engine.rollout import make_sampler

    device, dtype = pick_device(cpu, bf16)
    model, tokenizer = load_model(name, dtype)
    return make_sampler(model.to(device).eval(), tokenizer), tokenizer


def ask(question: str, trained: dict, free: bool = False, example: bool = False) -> list[dict]:
    """What the model is asked: as it was trained, prompts.py where that is not known; or freely, without more.

    Args:
        trained: its recipe.json; {} where there is none.
        example: behind WORKED_EXAMPLE, whatever it was trained behind.
    """
    if free:
        return [{"role": "user", "content": f"{question}\n{FREE_PROMPT}"}]
    return to_conversation(question, **prompt_of(trained) | ({"example": WORKED_EXAMPLE} if example else {}))


def sample(
    sampler: "Sampler | PlainSampler", tokenizer: "PreTrainedTokenizerBase", prompts: list[list[dict]], tokens: int
) -> list[list[dict]]:
    """SAMPLES answers to each prompt, as `judge` takes them."""
    from engine.models import encode

    ids = [prompt for prompt in encode(tokenizer, prompts) for _ in range(SAMPLES)]
    drawn = sampler.generate(ids, tokens, TEMPERATURE)
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    answers = [{"text": text, "ended": new[-1] in sampler.eos} for text, new in zip(texts, drawn, strict=True)]
    return [answers[start : start + SAMPLES] for start in range(0, len(answers), SAMPLES)]


# ------------------------------------------------------------------------------------------------------------- a run
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """How this run goes. Raises UserError for a flag or a constant that cannot be."""
    parser = argparse.ArgumentParser(description="traces by rejection sampling", allow_abbrev=False)
    parser.add_argument("--model", help=f"hub id, saved model, checkpoint or adapter (default: {train_grpo.MODEL})")
    parser.add_argument("--dataset", help="hub id or folder (default: what the model was trained on)")
    parser.add_argument("--split", default="train", help="any but the test split (default: train)")
    parser.add_argument("--output", help=f"where this run writes (default: {OUTPUT_DIR}, the demo: output/demo)")
    parser.add_argument("--skip", type=int, help="leave out the first so many questions, which were learned say")
    parser.add_argument("--limit", type=int, help="then ask so many only")
    parser.add_argument("--seed", type=int, help=f"of the sampling (default: {train_grpo.SEED})")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--free", action="store_true", help="ask for a \\boxed{} instead of the format")
    asked.add_argument("--example", action="store_true", help="ask behind WORKED_EXAMPLE of prompts.py")
    parser.add_argument("--demo", action="store_true", help="the demo's model and problems, any machine")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    flags = parser.parse_args(argv)
    if "test" in flags.split.lower():
        raise UserError(f"--split {flags.split}: test questions measure, and must never be learned; use train")
    if flags.free and flags.demo and not flags.model:
        raise UserError(
            "--free --demo: the demo's model has never seen a \\boxed{}; leave out --free, or name a --model"
        )
    if flags.skip is not None and flags.skip < 1:
        raise UserError(f"--skip {flags.skip}: 1 or more; leave it out to skip none")
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit {flags.limit}: at least 1 question is needed")
    constants = constants_of(sys.modules[__name__])
    check_types(SimpleNamespace(**constants), sys.modules[__name__])
    check_ranges(constants, {}, "make_traces.py")
    flags.output = flags.output or (None if flags.demo else OUTPUT_DIR)
    return flags


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    recipe = train_grpo.make_recipe(argparse.Namespace(**vars(flags), max_steps=None))
    output = Path(recipe.OUTPUT_DIR)
    log, traces_file = output / "questions.jsonl", output / "traces.jsonl"

    from engine.models import find_beside

    # as the model was trained, if it was here; and no trace may be longer than what its student may write
    trained = vars(recipe) | find_beside(recipe.MODEL, "recipe/recipe.json")
    how = {"free": flags.free, "example": flags.example}
    prompt = ask("", trained, **how)
    if not (flags.free or flags.example) and prompt != to_conversation(""):
        note("the model is asked under the prompt that it was trained under; its traces get that of prompts.py")
    tokens = trained["MAX_COMPLETION_TOKENS"]
    dataset = recipe.DATASET if flags.dataset or flags.demo else trained["DATASET"]
    settings = {"model": recipe.MODEL, "dataset": dataset, "split": flags.split}
    settings |= {"skip": flags.skip, "seed": recipe.SEED, "free": flags.free, "prompt": prompt, "tokens": tokens}
    claim(output, settings | {"SAMPLES": SAMPLES, "TEMPERATURE": TEMPERATURE})
    if flags.demo:
        pretraining.provide(output / "base", flags.model, flags.dataset)

    import torch

    # ---- the questions, and those that an earlier run has sampled
    questions = load_questions(dataset, flags.split)
    pairs = zip(questions["prompt"], questions["answer"], strict=True)
    asked = [(prompt[-1]["content"], label) for prompt, label in pairs][flags.skip :][: flags.limit]
    if not asked:
        raise UserError(f"--skip {flags.skip}: the data set {dataset!r} has only {len(questions)} questions there")
    rows = read_log(log, asked)
    if len(rows) < len(asked):
        rows = rows[: len(rows) // QUESTIONS * QUESTIONS]  # a batch is drawn whole, else its draws would differ
    write(log, rows)

    # ---- sample
    begun, start = len(rows), time.perf_counter()
    if begun < len(asked):
        sampler, tokenizer = load_sampler(recipe.MODEL, flags.cpu, trained["BF16"])
    while len(rows) < len(asked):
        batch = asked[len(rows) : len(rows) + QUESTIONS]
        # of seed and place: a batch comes out the same, whether all before it were drawn in this run or not
        torch.manual_seed(random.Random(f"{recipe.SEED} {len(rows)}").getrandbits(32))
        try:
            drawn = sample(sampler, tokenizer, [ask(question, trained, **how) for question, _ in batch], tokens)
        except torch.OutOfMemoryError as error:
            raise UserError("out of GPU memory; lower QUESTIONS, and the same command goes on") from error
        new = [judge(question, label, samples) for (question, label), samples in zip(batch, drawn, strict=True)]
        append(log, new)
        rows += new
        seconds = (time.perf_counter() - start) / (len(rows) - begun) * (len(asked) - len(rows))
        kept = sum(len(row["kept"]) for row in rows)
        progress = f"question {len(rows):4}/{len(asked)}  right {pass_rate(rows):4.0%}  kept {kept}"
        print(f"{progress}  left {timedelta(seconds=round(seconds))}", flush=True)

    # ---- the traces, under the prompt of prompts.py whatever they were sampled under
    traces = [
        {"prompt": to_conversation(row["question"]), "completion": [{"role": "assistant", "content": trace}]}
        | {"answer": row["label"], "right": row["right"], "samples": SAMPLES}
        for row in rows
        for trace in row["kept"]
    ]
    fell = Counter(each["fault"] for row in rows for each in row["samples"] if each["fault"])
    why = ", ".join(f"{count} {fault}" for fault, count in fell.most_common()) or "none"
    if not traces:
        traces_file.unlink(missing_ok=True)  # of other filters
        raise UserError(
            f"none of {len(rows) * SAMPLES} samples became a trace: {pass_rate(rows):.1%} right; fell: {why}; ask "
            "another way (--example, --free), pass a better --model, or loosen the filter in question"
        )
    write(traces_file, traces)
    sifted = write_sifted(output / "sifted", rows, dataset)
    solved, covered = (sum(bool(row[name]) for row in rows) for name in ("right", "kept"))
    lengths = sorted(len(trace["completion"][0]["content"]) for trace in traces)
    print(f"model      {recipe.MODEL}")
    print(f"data       {dataset}, split {flags.split}: {len(rows)} questions x {SAMPLES} samples")
    print(f"right      {pass_rate(rows):.1%} of the samples, {solved} questions at least once")
    print(f"kept       {len(traces)} traces of {covered} questions, {lengths[len(lengths) // 2]} characters (median)")
    print(f"fell       {why}")
    print(f"sifted     {sifted}")
    print(f"written    {traces_file}, {log}")


def pass_rate(rows: list[dict]) -> float:
    return sum(row["right"] for row in rows) / (len(rows) * SAMPLES)


if __name__ == "__main__":
    run(main)
