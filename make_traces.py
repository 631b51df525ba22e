r"""Let a model answer training questions and keep what is right and readable: traces that train_sft.py learns from.

The rejection sampling of DeepSeek-R1 (arXiv 2501.12948, stage 3): several answers a question; those that end in the
label are rewritten into the two blocks of the format, and mixed languages, long paragraphs and code blocks fall.

    python make_traces.py --model output/grpo  # what train_grpo.py saved: the data of R1's second fine-tuning
    python make_traces.py --example            # a cold start: asked behind WORKED_EXAMPLE of prompts.py (few-shot)
    python make_traces.py --free               # another: asked for a \boxed{}, it reasons as it always has
    python make_traces.py --free --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B    # distillation, on a card of 24 GB
    python make_traces.py --demo               # the demo's model and problems, any machine

`traces.jsonl` in the output folder holds a line for every kept trace: prompt, completion, answer. `questions.jsonl`
holds a line for every question: its label, all samples and why each fell, how many were right, the traces kept.
`learnable` is a data set of the questions that are right in some samples and wrong in others, which GRPO learns from:
`train_grpo.py --dataset output/traces/learnable`. The same command goes on where it was stopped, and with a later end
of --questions to more of them. With another filter it judges again what was sampled, without a model. A trace holds the
question alone, however it was asked: so what a model can do behind an example is taught to one that is asked without.
"""

import argparse
import random
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import train_grpo
from engine import demo, pretraining, runs
from engine.console import UserError, run
from engine.constants import check_constants, constants_of
from engine.fingerprints import fingerprint_weights
from engine.folder import lock
from engine.questions import load_splits, pairs_of, slice_of, to_prompt
from engine.templates import carried_prompt, carry_prompt, encode, prompt_turns, trained_recipe
from engine.traces import append_lines, judge, open_folder, read_log, write_learnable, write_lines
from prompts import WORKED_EXAMPLE

if TYPE_CHECKING:  # imported where they are used: the one-line errors need no seconds to start
    from transformers import PreTrainedTokenizerBase

    from engine.rollout import Sampler

# ---------------------------------------------------------------------------------------------------- the sampling
OUTPUT_DIR: str = "output/traces"  # --output
SAMPLES: int = 8  # answers a question, 1 or more; more find traces for harder questions, time grows with them
TEMPERATURE: float = 0.8  # above 0; lower is right more often, higher differs more
QUESTIONS_AT_ONCE: int = 16  # 128 answers, whose keys and values take 5 GB beside the 15 GB of a 7B teacher
MIN_RIGHT: int = 2  # right answers, but not all of them, that make a question learnable; 1 of 8 is mostly luck
FREE_PROMPT: str = "请一步一步推理，最后把答案写在 \\boxed{} 里"  # behind the question, under --free

# -------------------------------------------------------------------------------- the filters, each on the thinking
KEEP: int = 4  # traces a question, the first drawn; the shortest would teach short thinking, all mostly easy questions
MIN_THINKING: int = 20  # characters; what is shorter is a guess
MAX_PARAGRAPH: int = 400  # characters of a line; nobody reads longer ones
MIN_CHINESE: float = 0.95  # share of its letters, up to 1; 0.95 lets one English word of six letters pass in 120

# What train_grpo.py says holds here too.
SHARED = "MODEL DATASET SEED MAX_COMPLETION_TOKENS BF16 DEV_QUESTIONS SYSTEM_PROMPT EXAMPLE".split()


def configure(argv: list[str] | None, constants: dict[str, Any]) -> tuple[argparse.Namespace, SimpleNamespace]:
    """The flags and the checked constants of this run. Raises UserError for what cannot be."""
    parser = argparse.ArgumentParser(description="traces by rejection sampling", allow_abbrev=False)
    parser.add_argument("--model", help=f"hub id, saved model, checkpoint or adapter (default: {train_grpo.MODEL})")
    parser.add_argument("--dataset", help="hub id, folder or file (default: what the model was trained on)")
    parser.add_argument("--output", help=f"where this run writes (default: {OUTPUT_DIR}, the demo: output/demo)")
    parser.add_argument("--questions", metavar="FROM:TO", help="ask these training questions only, such as 400:800")
    parser.add_argument("--seed", type=int, help=f"of the sampling (default: {train_grpo.SEED})")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--free", action="store_true", help="ask for a \\boxed{} instead of the format")
    asked.add_argument("--example", action="store_true", help="ask behind WORKED_EXAMPLE of prompts.py")
    parser.add_argument("--demo", action="store_true", help="the demo's model and problems, any machine")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    flags = parser.parse_args(argv)
    if flags.free and flags.demo and not flags.model:
        raise UserError(
            "--free --demo: the demo's model has never seen a \\boxed{}; leave out --free, or name a --model"
        )
    flags.questions = slice_of(flags.questions)
    shared = train_grpo.default_recipe()
    defaults = {name: shared[name] for name in SHARED} | constants_of(sys.modules[__name__])
    recipe = runs.make_recipe(defaults, constants, flags, demo.RECIPE)
    trained = trained_recipe(recipe.MODEL)
    recipe.BF16 = trained.get("BF16", recipe.BF16)
    # a trace must not be longer than what its student may write
    recipe.MAX_COMPLETION_TOKENS = trained.get("MAX_COMPLETION_TOKENS", recipe.MAX_COMPLETION_TOKENS)
    if not (flags.dataset or flags.demo):
        recipe.DATASET = trained.get("DATASET", recipe.DATASET)
    check_constants(vars(recipe), train_grpo, sys.modules[__name__])
    runs.check_folders(recipe, flags.demo)
    return flags, recipe


# --------------------------------------------------------------------------------------------------------- the model
def load_sampler(recipe: SimpleNamespace, flags: argparse.Namespace) -> tuple["Sampler", "PreTrainedTokenizerBase"]:
    """The model, its weights in bf16 where training autocasts: a 7B one in float32 fits neither 24 GB nor the host."""
    from engine.models import load_model, pick_device
    from engine.rollout import make_sampler

    device, dtype = pick_device(flags.cpu, recipe.BF16)
    turns = prompt_turns(recipe.SYSTEM_PROMPT, recipe.EXAMPLE)
    model, tokenizer = load_model(recipe.MODEL, dtype, prompt=turns, free=flags.free)
    if flags.example:
        system = carried_prompt(tokenizer.chat_template)[0]
        tokenizer.chat_template = carry_prompt(tokenizer.chat_template, [system, *WORKED_EXAMPLE])
    return make_sampler(model.to(device).eval(), tokenizer), tokenizer


def ask(question: str, recipe: SimpleNamespace, flags: argparse.Namespace) -> list[dict]:
    """What the model is asked; its chat template adds the prompt."""
    return to_prompt(f"{question}\n{recipe.FREE_PROMPT}" if flags.free else question)


def sample(
    sampler: "Sampler",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[dict]],
    recipe: SimpleNamespace,
) -> list[list[dict]]:
    """SAMPLES answers to each prompt, as `judge` takes them."""
    ids = [prompt for prompt in encode(tokenizer, prompts) for _ in range(recipe.SAMPLES)]
    drawn = sampler.generate(ids, recipe.MAX_COMPLETION_TOKENS, recipe.TEMPERATURE)
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    answers = [{"text": text, "ended": new[-1] in sampler.eos} for text, new in zip(texts, drawn, strict=True)]
    return [answers[start : start + recipe.SAMPLES] for start in range(0, len(answers), recipe.SAMPLES)]


def sample_all(
    rows: list[dict], asked: list[tuple[str, int]], log: Path, recipe: SimpleNamespace, flags: argparse.Namespace
) -> None:
    """Ask the questions that `rows` does not hold yet, and add them there and to the file `log`.

    Raises:
        UserError: a GPU's memory is full, or the file cannot be written.
    """
    import torch

    begun, start = len(rows), time.perf_counter()
    sampler, tokenizer = load_sampler(recipe, flags)
    while len(rows) < len(asked):
        batch = asked[len(rows) : len(rows) + recipe.QUESTIONS_AT_ONCE]
        # The seed depends on the place: a batch comes out the same, in whatever run those before it were drawn.
        torch.manual_seed(random.Random(f"{recipe.SEED} {len(rows)}").getrandbits(32))
        try:
            drawn = sample(sampler, tokenizer, [ask(question, recipe, flags) for question, _ in batch], recipe)
        except torch.OutOfMemoryError as error:
            raise UserError("out of GPU memory; lower QUESTIONS_AT_ONCE, and the same command goes on") from error
        new = [judge(question, label, samples, recipe) for (question, label), samples in zip(batch, drawn, strict=True)]
        append_lines(log, new)
        rows += new
        seconds = (time.perf_counter() - start) / (len(rows) - begun) * (len(asked) - len(rows))
        kept = sum(len(row["kept"]) for row in rows)
        progress = f"question {len(rows):4}/{len(asked)}  right {right_share(rows, recipe):4.0%}  kept {kept}"
        print(f"{progress}  left {timedelta(seconds=round(seconds))}", flush=True)


def right_share(rows: list[dict], recipe: SimpleNamespace) -> float:
    """The share of right answers among all samples: the mean pass rate of the questions."""
    return sum(row["right"] for row in rows) / (len(rows) * recipe.SAMPLES)


# ------------------------------------------------------------------------------------------------------------- a run
def main(argv: list[str] | None = None, **constants: Any) -> None:
    """Sample, judge and write. `constants` replace those above, and the shared ones, by name, for this run."""
    flags, recipe = configure(argv, constants)
    output = Path(recipe.OUTPUT_DIR)
    log, traces_file = output / "questions.jsonl", output / "traces.jsonl"
    lock(output)
    if flags.demo:
        pretraining.prepare_demo(output / "base", recipe.MODEL, recipe.DATASET)
    settings = {"model": recipe.MODEL, "weights": fingerprint_weights(recipe.MODEL), "dataset": recipe.DATASET}
    prompt = (
        [] if flags.free else prompt_turns(recipe.SYSTEM_PROMPT, WORKED_EXAMPLE if flags.example else recipe.EXAMPLE)
    )
    settings |= {"skip": flags.questions.start or None, "seed": recipe.SEED, "free": flags.free}
    settings["prompt"] = prompt + ask("", recipe, flags)
    settings |= {"tokens": recipe.MAX_COMPLETION_TOKENS}
    settings |= {name: getattr(recipe, name) for name in ("SAMPLES", "TEMPERATURE")}
    open_folder(output, settings)

    # ---- the questions, and those that an earlier run has sampled
    train, dev, test = load_splits(recipe.DATASET, recipe.DEV_QUESTIONS)
    asked = pairs_of(train)[flags.questions]
    if not asked:
        first = flags.questions.start
        raise UserError(f"--questions {first}:...: the data set {recipe.DATASET!r} has only {len(train)} to train on")
    rows = read_log(log, asked, recipe)
    if len(rows) < len(asked):  # a batch is drawn whole, else its draws would differ
        rows = rows[: len(rows) // recipe.QUESTIONS_AT_ONCE * recipe.QUESTIONS_AT_ONCE]
    write_lines(log, rows)
    if len(rows) < len(asked):
        sample_all(rows, asked, log, recipe, flags)

    # ---- the traces
    traces = [
        {"prompt": to_prompt(row["question"]), "completion": [{"role": "assistant", "content": trace}]}
        | {"answer": row["label"], "right": row["right"], "samples": recipe.SAMPLES}
        for row in rows
        for trace in row["kept"]
    ]
    faults = Counter(each["fault"] for row in rows for each in row["samples"] if each["fault"])
    why = ", ".join(f"{count} {fault}" for fault, count in faults.most_common()) or "none"
    if not traces:
        traces_file.unlink(missing_ok=True)  # of other filters
        raise UserError(
            f"none of {len(rows) * recipe.SAMPLES} samples became a trace: {right_share(rows, recipe):.1%} right; "
            f"dropped: {why}; ask another way (--example, --free), pass a better --model, or loosen a filter"
        )
    write_lines(traces_file, traces)
    learnable = write_learnable(output / "learnable", rows, pairs_of(dev), pairs_of(test), recipe)
    solved, covered = (sum(bool(row[name]) for row in rows) for name in ("right", "kept"))
    lengths = sorted(len(trace["completion"][0]["content"]) for trace in traces)
    print(f"model      {recipe.MODEL}")
    print(f"data       {recipe.DATASET}: {len(rows)} training questions x {recipe.SAMPLES} samples")
    print(f"right      {right_share(rows, recipe):.1%} of the samples, {solved} questions at least once")
    print(f"kept       {len(traces)} traces of {covered} questions, {lengths[len(lengths) // 2]} characters (median)")
    print(f"dropped    {why}")
    print(f"learnable  {learnable}")
    print(f"written    {traces_file}, {log}")


if __name__ == "__main__":
    run(main)
