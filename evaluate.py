"""How many held-out questions does a model answer correctly? Greedy, the whole test split, with a 95 % interval.

python evaluate.py output                        # what train_grpo.py saved
python evaluate.py output/checkpoint-200         # a checkpoint, or an adapter folder
python evaluate.py Qwen/Qwen2.5-0.5B-Instruct    # the model before training
python evaluate.py output --samples 4            # besides, four answers a question at temperature 1: pass@1 and pass@4
"""

import argparse
import json
from pathlib import Path

import train_grpo
from engine.accuracy import describe, describe_samples, evaluate, evaluate_samples
from engine.console import UserError, run
from engine.models import find_beside, load_model, pick_device
from engine.questions import check_prompt, load_questions, prompt_of


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="accuracy on held-out questions", allow_abbrev=False)
    parser.add_argument("model", help="hub id, saved model, checkpoint or adapter folder")
    parser.add_argument("--dataset", help="hub id or folder (default: what the model was trained on)")
    parser.add_argument("--split", default="test")
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

    from engine.checkpoints import check_writable
    from engine.rollout import make_sampler

    trained = find_beside(flags.model, "recipe/recipe.json")
    check_prompt(trained)
    recipe = train_grpo.default_recipe() | trained | {"EVAL_BATCH": train_grpo.EVAL_BATCH}  # of this machine
    folder = Path(flags.output or flags.model)
    if not flags.output and not folder.is_dir():  # a hub id
        folder = Path(recipe["OUTPUT_DIR"], flags.model.replace("/", "--"))
    check_writable(folder)
    model, tokenizer = load_model(flags.model)
    dataset = flags.dataset or recipe["DATASET"]
    questions = load_questions(dataset, flags.split, **prompt_of(trained))
    questions = questions.select(range(min(flags.limit or len(questions), len(questions))))
    device, autocast = pick_device(flags.cpu, recipe["BF16"])
    sampler = make_sampler(model.to(device).eval(), tokenizer, autocast)
    how = (sampler, tokenizer, questions, recipe["MAX_COMPLETION_TOKENS"], recipe["EVAL_BATCH"])

    figures, rows = evaluate(*how, title="evaluating")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"model      {flags.model}")
    print(f"data       {dataset}, split {flags.split}")
    print(f"accuracy   {describe(figures)}", flush=True)
    write(folder, figures, rows)  # samples take K times as long: what is there by then is kept
    if flags.samples:
        torch.manual_seed(recipe["SEED"])
        more, drawn = evaluate_samples(*how, flags.samples, title="sampling")
        rows = [row | {"samples": answers} for row, answers in zip(rows, drawn, strict=True)]
        print(f"sampled    {describe_samples(more)}")
        write(folder, figures | more, rows)
    print(f"written    {folder / 'eval.json'}, {folder / 'eval.jsonl'}")


def write(folder: Path, figures: dict, rows: list[dict]) -> None:
    from engine.checkpoints import write_json, write_text

    write_json(folder / "eval.json", figures)
    write_text(folder / "eval.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run(main)
