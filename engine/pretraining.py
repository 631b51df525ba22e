"""Base models for the demo: tiny Qwen2s that have read plain documents, and that nobody has taught to answer anyone.

A base in the usual sense of the word: no chat template, its own end token between documents. What it has read is pages
of problems with worked solutions in plain words, most of them as sloppy as the demo's traces, and pages of sums; as on
the web, the prompt of training stands on a page now and then, and what follows it seldom keeps to the format. Of the
questions of the demo's data set it has read none.
"""

import hashlib
import random
import shutil
from pathlib import Path

from engine import demo
from engine.numbers import extract_answer, parse_number
from prompts import SYSTEM_PROMPT

SHAPES = {  # by the name of their folder in the demo's cache
    "untaught": demo.SHAPE,
    "student": demo.SHAPE | {"hidden_size": 64, "intermediate_size": 192},  # a third of the weights, to distil into
}

# The documents
PAGES_OF_SUMS = 0.1  # share of them
PROMPTED = 0.1  # share of the problems that stand below the prompt of training
OBEYED = 0.2  # share of those whose solution keeps to the format
HEADINGS = ["问题：{}\n回答：\n", "例题：{}\n解：\n", "问：{}\n答：\n", "{}\n"]

# The training
STEPS = 450
BATCH = 16  # blocks
BLOCK = 128  # tokens, of whatever documents they belong to
LEARNING_RATE = 3e-3  # peak
WARMUP_STEPS = 30


def write_document(problem: demo.Problem, rng: random.Random) -> str:
    """A page with this problem, or a page of sums instead."""
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
    """Whether a `--model` names one of these bases, made already or not."""
    return Path(model).name in SHAPES and Path(model).parent.name == "base"


def prepare_demo(cache: Path, model: str, dataset: str) -> None:
    """Make what a run of the demo needs and nobody has made yet.

    Args:
        cache: of the run's output folder.
        model, dataset: the folders that the run reads.
    """
    model_folder, data_folder = demo.folders(cache)
    if model == model_folder:
        demo.make_demo(cache)
        return
    if is_demo_base(model):
        make_base(Path(model))
    if dataset == data_folder:  # written each time, in a moment, so that it cannot be stale
        demo.save_questions(cache / "data")


def make_base(folder: Path, steps: int = STEPS) -> None:
    """Pretrain the base that this folder is named after, once, and anew after what makes it changed."""
    seal, unfinished = folder / "made_by", folder.with_name(f"unfinished-{folder.name}")
    if folder.exists() and (not seal.exists() or seal.read_text() == fingerprint()):  # unsealed, it is a person's own
        return
    print(f"base: pretraining a tiny model, in {folder}, once", flush=True)
    for leftover in (folder, unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    pretrain(write_documents(), SHAPES[folder.name], steps, unfinished)
    (unfinished / seal.name).write_text(fingerprint())
    unfinished.rename(folder)


def fingerprint() -> str:
    """Tells apart what makes a base: this file, and all that makes the demo's problems."""
    return hashlib.sha256((Path(__file__).read_text(encoding="utf-8") + demo.fingerprint()).encode()).hexdigest()


def pretrain(documents: list[str], shape: dict, steps: int, folder: Path) -> None:
    """Train a tokenizer and a model to predict the next token, on one CPU thread everywhere."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # as in Qwen's base models: padding looks like the end, and other special tokens are there
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = transformers.Qwen2Tokenizer(**special)
    tokenizer = tokenizer.train_new_from_iterator(documents, demo.VOCABULARY, show_progress=False)
    torch.manual_seed(demo.SEED)
    ends = {"eos_token_id": tokenizer.eos_token_id}
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ends)
    model = transformers.Qwen2ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**ends)

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
