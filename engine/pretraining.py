"""Base models for the demo: tiny Qwen2s that have learned to continue documents, not to answer anybody.

They have no chat template, and an end token of their own between documents. The documents are problems with worked
solutions in plain words, mostly as sloppy as the demo's traces, and pages of sums. A few contain the prompt of the
training, seldom with an answer in the format. None contains a question of the demo's data set.
"""

import random
from pathlib import Path

from engine import demo
from engine.numbers import extract_answer, parse_number
from prompts import SYSTEM_PROMPT

SHAPES = {  # by the name of the model's folder in the demo's cache
    "untaught": demo.SHAPE,
    "student": demo.SHAPE | {"hidden_size": 64, "intermediate_size": 192},  # a third of the weights, to distil into
}

# The documents
PAGES_OF_SUMS = 0.1  # share of them
PROMPTED = 0.1  # share of the problems that follow the prompt of the training
OBEYED = 0.2  # share of those whose solution has the format
HEADINGS = ["问题：{}\n回答：\n", "例题：{}\n解：\n", "问：{}\n答：\n", "{}\n"]

# The training
STEPS = 450
BATCH = 16  # blocks
BLOCK = 128  # tokens; a block may hold several documents
LEARNING_RATE = 3e-3  # peak
WARMUP_STEPS = 30


def write_document(problem: demo.Problem, rng: random.Random) -> str:
    """A document with this problem, or one of sums instead."""
    if rng.random() < PAGES_OF_SUMS:
        pairs = [(rng.randint(2, 9), rng.choice([2, 5, 7, 10, 60, 70])) for _ in range(8)]
        return "\n".join(f"{a}*{b}={a * b}" for a, b in pairs)
    thought = problem.trace.partition("<answer>")[0].replace("<think>", "").replace("</think>", "").strip()
    solution = f"{thought}\n答案是{parse_number(extract_answer(problem.trace)):f}。"
    if rng.random() >= PROMPTED:
        return rng.choice(HEADINGS).format(problem.question) + solution
    solution = problem.trace if rng.random() < OBEYED else solution
    return f"{SYSTEM_PROMPT}\n\n" + HEADINGS[0].format(problem.question) + solution


def write_documents() -> list[str]:
    rng = random.Random(f"{demo.SEED} documents")
    return [write_document(problem, rng) for problem in demo.draw_problems("traces", demo.TRACES)]


def is_demo_base(model: str) -> bool:
    """Whether `--model` names one of these bases, made already or not."""
    return Path(model).name in SHAPES and Path(model).parent.name == "base"


def prepare_demo(cache: Path, model: str, dataset: str) -> None:
    """Make what a run of the demo reads and nobody has made yet.

    Args:
        cache: the folder `base` in the run's output folder.
        model, dataset: the folders that the run reads.
    """
    model_folder, data_folder = demo.folders(cache)
    if dataset == data_folder:
        demo.make_once(Path(dataset), demo.save_questions)
    if model == model_folder:
        demo.make_demo(cache)
    elif is_demo_base(model):
        make_base(Path(model))


def make_base(folder: Path, steps: int = STEPS) -> None:
    """Pretrain the base that this folder is named after, unless it is there."""
    demo.make_once(folder, lambda to: pretrain(write_documents(), SHAPES[folder.name], steps, to))


def pretrain(documents: list[str], shape: dict, steps: int, folder: Path) -> None:
    """Train a model to predict the next token, on one CPU thread, so that every machine makes the same model."""
    import torch
    import transformers

    model, tokenizer = demo.make_untrained(documents, shape, "<|endoftext|>")
    ids = [tokens + [tokenizer.eos_token_id] for tokens in tokenizer(documents)["input_ids"]]
    rng, order, stream = random.Random(demo.SEED), [], []
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(1, steps + 1):
        while len(stream) < BATCH * BLOCK:
            order = order or rng.sample(ids, len(ids))
            stream += order.pop()
        batch, stream = torch.tensor(stream[: BATCH * BLOCK]).view(BATCH, BLOCK), stream[BATCH * BLOCK :]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"base: step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
