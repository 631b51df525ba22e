"""How many held-out questions does a model answer correctly? Greedy, the whole test split, with a 95 % interval.

python evaluate.py output/grpo                   # what train_grpo.py saved
python evaluate.py output/grpo/checkpoint-200    # a checkpoint, or an adapter folder
python evaluate.py Qwen/Qwen2.5-0.5B-Instruct    # the model before training
python evaluate.py output/grpo --samples 4       # besides, four answers a question at temperature 1: pass@1 and pass@4
python evaluate.py output/grpo --against output/sft    # besides, which one has more questions right, and is it chance
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train_grpo
from engine.accuracy import (
    compare,
    compare_samples,
    describe,
    describe_samples,
    evaluate,
    evaluate_samples,
    read_answers,
)
from engine.console import UserError, run
from engine.constants import make_recipe
from engine.folder import check_writable, write_text
from engine.numbers import extract_answer
from engine.questions import load_questions, load_splits, pairs_of, slice_of, to_prompt
from engine.templates import trained_recipe

if TYPE_CHECKING:  # imported where it is used: `--help` and the one-line errors need no seconds to start
    from datasets import Dataset


def main(argv: list[str] | None = None, **constants: Any) -> None:
    """Evaluate. `constants` replace those of train_grpo.py, and what the model's own training recorded."""
    parser = argparse.ArgumentParser(description="accuracy on held-out questions", allow_abbrev=False)
    parser.add_argument("model", help="hub id, saved model, checkpoint or adapter folder")
    parser.add_argument("--dataset", help="hub id, folder or file (default: what the model was trained on)")
    parser.add_argument("--split", default="test", choices=("test", "dev"), help="dev: the development questions")
    parser.add_argument("--questions", metavar="FROM:TO", help="these questions only, such as :300 for the first 300")
    parser.add_argument("--samples", type=int, default=0, help="besides, so many answers a question at temperature 1")
    parser.add_argument("--against", metavar="MODEL", help="compare the answers with another model's, by question")
    parser.add_argument("--output", help="folder for eval.json and eval.jsonl (default: the model's)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    flags = parser.parse_args(argv)
    flags.questions = slice_of(flags.questions)
    if flags.samples < 0:
        raise UserError(f"--samples {flags.samples}: 0 or more answers a question")
    folder = Path(flags.output) if flags.output else folder_of(flags.model)
    check_writable(folder)
    trained = trained_recipe(flags.model)
    recipe = make_recipe(train_grpo.default_recipe() | trained, {}, constants, {"DATASET": flags.dataset})
    if flags.split == "dev":
        _, questions, _ = load_splits(recipe.DATASET, recipe.DEV_QUESTIONS)
    else:
        questions = load_questions(recipe.DATASET, "test")
    questions = questions.select(range(len(questions))[flags.questions])
    if not len(questions):
        raise UserError(f"--questions: the data set {recipe.DATASET!r} has no question in that range of its split")
    others = answers_of(flags.against, questions) if flags.against else []

    import torch

    from engine.memory import fit_answers
    from engine.models import load_model, pick_device
    from engine.rollout import make_sampler

    model, tokenizer = load_model(flags.model)
    device, autocast = pick_device(flags.cpu, recipe.BF16)
    sampler = make_sampler(model.to(device).eval(), tokenizer, autocast)
    tokens = constants.get("MAX_COMPLETION_TOKENS") or model.generation_config.max_new_tokens
    tokens = tokens or recipe.MAX_COMPLETION_TOKENS
    at_once = constants.get("EVAL_BATCH", train_grpo.EVAL_BATCH)  # not what fitted the training's machine
    at_once = at_once or fit_answers(model, autocast is not None, train_grpo.MAX_PROMPT_TOKENS + tokens)
    asked = (sampler, tokenizer, questions, tokens, at_once)

    figures, rows = evaluate(*asked, title="evaluating")
    asked_too = {"prompt": [to_prompt(recipe.PROBE_QUESTION)], "answer": [None]}
    _, [told] = evaluate(sampler, tokenizer, asked_too, tokens, at_once)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"model      {flags.model}")
    print(f"data       {recipe.DATASET}, {flags.split} questions")
    print(f"accuracy   {describe(figures)}", flush=True)
    print(f"probe      {recipe.PROBE_QUESTION}: {extract_answer(told['completion']) or 'no answer'}", flush=True)
    probe = {"question": recipe.PROBE_QUESTION, "answer": told["completion"]}
    write_text(folder / "probe.json", json.dumps(probe, ensure_ascii=False) + "\n")
    write(folder, figures, rows)  # sampling takes several times as long: what is known by then is kept
    if flags.against:
        print(f"against    {flags.against}: {compare(rows, others)}", flush=True)
    if flags.samples:
        torch.manual_seed(recipe.SEED)
        more, drawn = evaluate_samples(*asked, flags.samples, title="sampling")
        rows = [row | {"samples": answers} for row, answers in zip(rows, drawn, strict=True)]
        print(f"sampled    {describe_samples(more)}")
        if flags.against:
            both = all("samples" in other for other in others)
            difference = compare_samples(rows, others) if both else "it was evaluated without --samples"
            print(f"against    {flags.against}: {difference}")
        write(folder, figures | more, rows)
    print(f"written    {folder / 'eval.json'}, {folder / 'eval.jsonl'}")


def folder_of(model: str) -> Path:
    """Where the answers of a model are written unless --output names another folder."""
    return Path(model) if Path(model).is_dir() else Path("output", model.replace("/", "--"))


def answers_of(model: str, questions: "Dataset") -> list[dict]:
    """The rows of these questions that an earlier evaluation of a model has written, in their order.

    Raises:
        UserError: it has not been evaluated, or on other questions.
    """
    file = folder_of(model) / "eval.jsonl"
    if not file.is_file():
        raise UserError(f"--against {model!r}: there is no {str(file)!r}; run `python evaluate.py {model}` first")
    known = {(row["question"], row["label"]): row for row in read_answers(file.parent)}
    missing = [pair for pair in pairs_of(questions) if pair not in known]
    if missing:
        raise UserError(
            f"--against {model!r}: {str(file)!r} lacks {len(missing)} of the {len(questions)} questions; evaluate both "
            "models with the same --dataset, --split and --questions"
        )
    return [known[pair] for pair in pairs_of(questions)]


def write(folder: Path, figures: dict, rows: list[dict]) -> None:
    """The figures in eval.json, and every question with its answers in eval.jsonl."""
    write_text(folder / "eval.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "eval.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run(main)
