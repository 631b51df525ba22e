"""How many held-out questions does a model answer correctly? Greedy, the whole test split, with a 95 % interval.

python evaluate.py output/grpo                   # what train_grpo.py saved
python evaluate.py output/grpo/checkpoint-200    # a checkpoint, or an adapter folder
python evaluate.py Qwen/Qwen2.5-0.5B-Instruct    # the model before training
python evaluate.py output/grpo --samples 4       # besides, four answers a question at temperature 1: pass@1 and pass@4
"""

import argparse
import json
from pathlib import Path

import train_grpo
from engine.accuracy import describe, describe_samples, evaluate, evaluate_samples
from engine.console import UserError, run
from engine.folder import check_writable, write_text
from engine.questions import load_questions, load_splits
from engine.templates import trained_recipe


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="accuracy on held-out questions", allow_abbrev=False)
    parser.add_argument("model", help="hub id, saved model, checkpoint or adapter folder")
    parser.add_argument("--dataset", help="hub id, folder or file (default: what the model was trained on)")
    parser.add_argument("--split", default="test", choices=("test", "dev"), help="dev: the development questions")
    parser.add_argument("--limit", type=int, help="the first so many questions only")
    parser.add_argument("--samples", type=int, default=0, help="besides, so many answers a question at temperature 1")
    parser.add_argument("--output", help="folder for eval.json and eval.jsonl (default: the model's)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    flags = parser.parse_args(argv)
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit {flags.limit}: at least 1 question is needed")
    if flags.samples < 0:
        raise UserError(f"--samples {flags.samples}: 0 or more answers a question")

    import torch

    from engine.models import load_model, pick_device
    from engine.rollout import make_sampler

    recipe = train_grpo.default_recipe() | trained_recipe(flags.model)
    folder = Path(flags.output or flags.model)
    if not flags.output and not folder.is_dir():  # a hub id
        folder = Path("output", flags.model.replace("/", "--"))
    check_writable(folder)
    model, tokenizer = load_model(flags.model)
    dataset = flags.dataset or recipe["DATASET"]
    if flags.split == "dev":
        _, questions, _ = load_splits(dataset, recipe["DEV_QUESTIONS"])
    else:
        questions = load_questions(dataset, "test")
    questions = questions.select(range(min(flags.limit or len(questions), len(questions))))
    device, autocast = pick_device(flags.cpu, recipe["BF16"])
    sampler = make_sampler(model.to(device).eval(), tokenizer, autocast)
    tokens = model.generation_config.max_new_tokens or recipe["MAX_COMPLETION_TOKENS"]
    asked = (sampler, tokenizer, questions, tokens, train_grpo.EVAL_BATCH)

    figures, rows = evaluate(*asked, title="evaluating")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"model      {flags.model}")
    print(f"data       {dataset}, {flags.split} questions")
    print(f"accuracy   {describe(figures)}", flush=True)
    write(folder, figures, rows)  # sampling takes several times as long: what is known by then is kept
    if flags.samples:
        torch.manual_seed(recipe["SEED"])
        more, drawn = evaluate_samples(*asked, flags.samples, title="sampling")
        rows = [row | {"samples": answers} for row, answers in zip(rows, drawn, strict=True)]
        print(f"sampled    {describe_samples(more)}")
        write(folder, figures | more, rows)
    print(f"written    {folder / 'eval.json'}, {folder / 'eval.jsonl'}")


def write(folder: Path, figures: dict, rows: list[dict]) -> None:
    """The figures in eval.json, and every question with its answers in eval.jsonl."""
    write_text(folder / "eval.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "eval.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run(main)
