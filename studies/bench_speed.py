"""What a GRPO step costs: TRL with the tutorial's settings, TRL with ours, and this project's trainer, side by side.

    python studies/bench_speed.py                          # random weights, nothing is downloaded
    python studies/bench_speed.py --model MODEL --traces output/traces/questions.jsonl --json speed.json
    python studies/bench_speed.py --against ../older --what training --weights lora    # beside another checkout
    python studies/bench_speed.py --profile --questions 1  # instead: the operators that a step spends its time in

--traces names what make_traces.py wrote. Its samples, eight to a question, are replayed in the training half, so every
variant trains on the same completions; generation and the whole step draw their own. Rewards are made up: a given share
of the groups has no spread, which the others have. TRL computes both kinds alike, so it is measured once. Without
--model the weights are random, in the shape of Qwen2.5-0.5B on CUDA, of the demo's model on a CPU.

Variants take turns in one process, each with a fresh model. Tables show medians over the rounds, smallest and largest
behind them. `tokens computed` are those that pass through the model in the training half, padding included.
"""

import argparse
import gc
import importlib
import json
import logging
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qwen
import torch
import transformers
import trl
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOTrainer

import train_grpo
from engine import demo, runs
from engine.console import UserError, run
from engine.lora import lora_config
from engine.models import load_model, pick_device
from engine.questions import to_prompt
from engine.rollout import Rollout
from engine.templates import encode
from engine.trainer import LeanGRPOTrainer

ROOT = Path(train_grpo.__file__).resolve().parent
CUDA = torch.cuda.is_available()
GROUP = train_grpo.COMPLETIONS_PER_QUESTION
TUTORIAL = {"BETA": 0.04, "LOSS_TYPE": "grpo", "SCALE_REWARDS": "group", "MICRO_BATCH": GROUP}  # one question at a time
MEASURED = {"training": "training half s", "generation": "generation s", "step": "step s"}  # flag -> its main figure


class Variant(NamedTuple):
    """A trainer, how it makes completions (None: TRL's way), and the constants in which it departs from the recipe."""

    name: str
    trainer: type[GRPOTrainer]
    rollout: Callable | None
    constants: dict = {}


VARIANTS = {
    "tutorial": Variant("TRL, tutorial's settings", GRPOTrainer, None, TUTORIAL),
    "trl": Variant("TRL, our settings", GRPOTrainer, None),
    "ours": Variant("this project", LeanGRPOTrainer, Rollout),
}


def load_checkout(folder: Path) -> Variant:
    """The trainer and the rollout of another checkout of this project, which bring its other modules along.

    Those have the names of ours, which step aside meanwhile; so nothing may be imported inside of a function that is
    measured. Raises UserError where there is no such checkout.
    """
    folder = folder.resolve()
    package = "engine." if (folder / "engine").is_dir() else ""  # before it there was none
    if folder == ROOT or not (folder / package.strip(".") / "trainer.py").exists():
        raise UserError(f"--against {str(folder)!r} is no other checkout of this project; name its root")

    def take_out(root: Path) -> dict[str, ModuleType]:
        """The modules that were loaded from a checkout's root or engine/, which are then no longer loaded."""
        places = (root, root / "engine")
        files = {name: Path(getattr(module, "__file__", None) or "/") for name, module in sys.modules.items()}
        return {name: sys.modules.pop(name) for name, file in files.items() if file.resolve().parent in places}

    ours = take_out(ROOT)
    sys.path.insert(0, str(folder))
    try:
        trainer, rollout = (importlib.import_module(f"{package}{name}") for name in ("trainer", "rollout"))
    finally:
        sys.path.remove(str(folder))
        take_out(folder)
        sys.modules.update(ours)
    kind = getattr(trainer, "LeanGRPOTrainer", None) or trainer.CarefulTrainer  # its name until the end of November
    return Variant(folder.name, kind, rollout.Rollout)


# ------------------------------------------------------------------------------------------------ what is trained on
class Work(NamedTuple):
    """Questions with a group of completions each, and where a fresh model comes from."""

    load: Callable  # () -> model, tokenizer
    questions: list[list[dict]]  # conversations
    completions: dict[str, list[list[int]]]  # last turn of a question -> token ids of its GROUP completions
    recipe: dict  # constants of train_grpo.py
    steps: int  # of a run
    warm: int  # steps that are not counted: kernels are prepared and graphs captured in them


def read_work(flags: argparse.Namespace, recipe: dict) -> Work:
    """A real model and what it answered. Raises UserError for too few questions."""
    lines = [json.loads(line) for line in flags.traces.read_text(encoding="utf-8").split("\n") if line]
    lines = [line for line in lines if len(line.get("samples", [])) >= GROUP]
    if len(lines) < flags.questions:
        raise UserError(
            f"--traces {str(flags.traces)!r} has {len(lines)} questions with {GROUP} samples, fewer than --questions "
            f"{flags.questions}; name the questions.jsonl of make_traces.py, or lower --questions"
        )
    tokenizer, completions = load_model(flags.model)[1], {}
    for line in lines[: flags.questions]:
        texts = tokenizer([each["text"] for each in line["samples"][:GROUP]], add_special_tokens=False)["input_ids"]
        completions[line["question"]] = [(ids + [tokenizer.eos_token_id])[: flags.tokens] for ids in texts]
    steps, warm = (3, 1) if CUDA else (1, 0)  # a CPU takes minutes for one
    questions = [to_prompt(question) for question in completions]
    return Work(partial(load_model, flags.model), questions, completions, recipe, steps, warm)


def make_work(flags: argparse.Namespace, recipe: dict, folder: Path) -> Work:
    """Random weights and random words. Many tokens of the vocabulary end a row, so that lengths, replayed or drawn, are
    as uneven as real ones: a third of the limit on average."""
    torch.manual_seed(0)
    draw, longest = random.Random(0), 256 if CUDA else 60
    shape = qwen.SHAPE if CUDA else demo.SHAPE | {"vocab_size": demo.VOCABULARY, "initializer_range": 0.02}
    model = Qwen2ForCausalLM(Qwen2Config(**shape | {"tie_word_embeddings": True, "bos_token_id": None}))
    model.generation_config.update(pad_token_id=0, eos_token_id=[*range(1, shape["vocab_size"], flags.tokens // 3)])
    model.save_pretrained(folder)  # TRL loads the tutorial's reference model from where this one came
    completions = {}
    for _ in range(flags.questions):
        question = " ".join(f"w{i}" for i in draw.choices(qwen.WORDS, k=draw.randint(longest // 4, longest)))
        lengths = [min(1 + int(draw.expovariate(3 / flags.tokens)), flags.tokens) for _ in range(GROUP)]
        completions[question] = [[*draw.choices(qwen.WORDS, k=length - 1), 1] for length in lengths]
    questions = [[{"role": "user", "content": question}] for question in completions]
    load = partial(Qwen2ForCausalLM.from_pretrained, folder, dtype=torch.float32)
    return Work(lambda: (load(), qwen.make_tokenizer()), questions, completions, recipe, steps=3, warm=1)


# ------------------------------------------------------------------------------------------------- one measured run
class Enough(Exception):
    """Nothing behind generation is to be measured."""


class Meter(TrainerCallback):
    """Makes the rewards of a run, and measures its steps.

    Args:
        flat: share of the groups whose rewards have no spread, always the same ones.
        only_generation: repeat the first step's generation as often as there would be steps, then raise Enough.
    """

    def __init__(self, work: Work, flat: float, only_generation: bool) -> None:
        self.work, self.only_generation, self.generating = work, only_generation, False
        self.flat = set(random.Random(0).sample([*work.completions], round(flat * len(work.completions))))
        self.generation: list[float] = []  # seconds of each
        self.lengths: list[list[int]] = []  # of what it made
        self.step: list[float] = []  # seconds of each
        self.computed: list[int] = []  # tokens through the model in a step, outside of generation

    def watch(self, trainer: GRPOTrainer) -> None:
        """From now on, whatever `trainer` does is measured."""
        trainer._generate = partial(self.generate, trainer._generate)
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.get_input_embeddings().register_forward_pre_hook(self.count)

    def generate(self, generate: Callable, prompts: list) -> tuple:
        self.generating = True
        for _ in range(self.work.steps if self.only_generation else 1):
            start = now()
            made = generate(prompts)
            self.generation.append(now() - start)
            self.lengths.append([len(ids) for ids in made[1]])
        self.generating = False
        if self.only_generation:
            raise Enough
        return made

    def replay(self, prompts: list, trainer: GRPOTrainer) -> dict:
        """A rollout of the given completions. Prompts come GROUP times each."""
        made = [self.work.completions[prompt[-1]["content"]][i % GROUP] for i, prompt in enumerate(prompts)]
        return {"prompt_ids": encode(trainer.processing_class, prompts), "completion_ids": made, "logprobs": None}

    def reward(self, prompts: list, **_) -> list[float]:
        return [float(prompt[-1]["content"] not in self.flat) * (i % GROUP) for i, prompt in enumerate(prompts)]

    def count(self, module: torch.nn.Module, args: tuple) -> None:
        if not self.generating:
            self.computed[-1] += args[0].numel()

    def on_step_begin(self, *_, **__) -> None:
        self.computed.append(0)
        self.step.append(-now())

    def on_step_end(self, *_, **__) -> None:
        self.step[-1] += now()

    def figures(self, what: str) -> dict[str, float]:
        """Medians over the counted steps of what was measured, as the table calls it."""
        longest, total = ([count(made) for made in self.lengths] for count in (max, sum))
        rest = [whole - part for whole, part in zip(self.step, self.generation, strict=False)]
        rates = [tokens / seconds for tokens, seconds in zip(total, self.generation, strict=True)]
        drawn = {"generation s": self.generation, "tokens drawn": total, "longest tokens": longest, "tokens/s": rates}
        trained = {"training half s": rest, "tokens computed": self.computed}
        columns = {"training": trained, "generation": drawn, "step": {"step s": self.step} | drawn | trained}[what]
        return {title: statistics.median(values[self.work.warm :]) for title, values in columns.items()}


def measure(
    work: Work, variant: Variant, what: str, lora: bool, flat: float, seed: int, record: AbstractContextManager
) -> dict:
    """A few steps of a fresh model: the figures of its Meter, and the peak of memory."""
    with tempfile.TemporaryDirectory(prefix="bench_speed_") as folder:  # nothing is written
        own = {"OUTPUT_DIR": folder, "MAX_STEPS": work.steps, "SEED": seed, "USE_LORA": lora, "REWARD_WEIGHTS": [1.0]}
        recipe = SimpleNamespace(**work.recipe | variant.constants | own)
        device, autocast = pick_device(cpu=False, bf16=recipe.BF16)
        accumulation = runs.accumulation_steps(recipe, ("QUESTIONS_PER_STEP", "COMPLETIONS_PER_QUESTION"), processes=1)
        config = train_grpo.grpo_config(recipe, device.type == "cpu", autocast is not None, accumulation)
        config.save_strategy = transformers.trainer_utils.SaveStrategy.NO
        model, tokenizer = work.load()
        meter = Meter(work, flat, what == "generation")
        trainer = variant.trainer(
            model=model,
            reward_funcs=meter.reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": work.questions}),
            processing_class=tokenizer,
            peft_config=lora_config(recipe, model),
            rollout_func=meter.replay if what == "training" else variant.rollout and variant.rollout(),
            callbacks=[meter],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        meter.watch(trainer)
        reset_peak()
        with suppress(Enough), record:
            trainer.train()
        figures = meter.figures(what) | {"peak GB": peak_gb()}
    del trainer, model, meter
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return figures


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """Count the peak of memory from here on. A process keeps a little of what earlier variants took."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """What was reserved on the GPU; without CUDA this process's memory, NaN where Linux does not tell."""
    if CUDA:
        return torch.cuda.max_memory_reserved() / 1e9
    with suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    return float("nan")


# ------------------------------------------------------------------------------------------------ what is said of it
def floor(work: Work) -> str:
    """Seconds that no program can beat here, at the rates of copying and multiplying that are measured now.

    For completions as long as the replayed ones: each prompt is computed once, in decoding each weight is read once a
    token, and in training every token passes forward and backward once.
    """
    model, tokenizer = work.load()
    device, autocast = pick_device(cpu=False, bf16=work.recipe["BF16"])
    n, m, dtype = 2**28 if CUDA else 2**24, 8192 if CUDA else 1024, autocast or torch.float32
    x, y = torch.ones(2, n, device=device)
    a = torch.randn(m, m, device=device, dtype=dtype)

    def seconds(do: Callable) -> float:
        do()
        start = now()
        for _ in range(10):
            do()
        return (now() - start) / 10

    rate, flops = 8 * n / seconds(lambda: y.copy_(x)), 2 * m**3 / seconds(lambda: a @ a)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    read = tokens = pairs = longest = 0  # tokens of prompts, of completions; pairs of a token and one it attends to
    for prompt, group in zip(encode(tokenizer, work.questions), work.completions.values(), strict=True):
        lengths = [len(row) for row in group]
        read, tokens, longest = read + len(prompt), tokens + sum(lengths), max(longest, *lengths)
        pairs += len(prompt) ** 2 / 2 + sum(length * (len(prompt) + length / 2) for length in lengths)
    attention = 12 * pairs * model.config.hidden_size * model.config.num_hidden_layers
    decode = max(longest * (body + head) * dtype.itemsize / rate, 2 * (body + head) * tokens / flops)
    full = (6 * body * (read + tokens) + 8 * head * tokens + attention) / flops + 40 * (body + head) / rate  # + AdamW
    lora = (4 * body * (read + tokens) + 6 * head * tokens + attention) / flops  # no gradients of the frozen weights
    return (
        f"floor at this machine's {rate / 1e9:.0f} GB/s and {flops / 1e12:.2f} TFLOP/s, no group flat: generation "
        f"{decode + 2 * body * read / flops:.2f} s, training half {full:.2f} s, with LoRA {lora:.2f} s"
    )


def table(runs: list[dict], what: str, weights: str) -> str:
    """One part of the step under one kind of weights: a line for each variant and share of flat groups.

    How many times as fast as the first one it is, is told round by round: by seconds, or by tokens a second where only
    generation is measured, since each draws its own.
    """
    rows: dict[str, list[dict]] = {}
    for each in runs:
        if (each["what"], each["weights"]) == (what, weights):
            title = each["variant"] + (f"; {each['flat']:.0%} of groups flat" if each["flat"] else "")
            rows.setdefault(title, []).append(each["figures"])
    first = next(iter(rows.values()))
    lines = [f"{what}, {weights} weights", "", f"| variant | {' | '.join(first[0])} | times as fast |"]
    lines.append("| --- |" + " ---: |" * (len(first[0]) + 1))

    def cell(values: list[float], column: str) -> str:
        digits = 0 if "tokens" in column else 2
        low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
        return middle if low == high else f"{middle} ({low} to {high})"

    def speed(figures: dict) -> float:
        return figures["tokens/s"] if what == "generation" else 1 / figures[MEASURED[what]]

    for title, made in rows.items():
        cells = [cell([each[column] for each in made], column) for column in first[0]]
        ratios = [speed(each) / speed(base) for base, each in zip(first, made, strict=False)]
        lines.append(f"| {title} | {' | '.join(cells)} | {cell(ratios, '')} |")
    return "\n".join(lines)


def show_profile(work: Work, lora: bool) -> None:
    """The operators of this project's step with replayed completions, by their own time, with their shapes."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * CUDA
    record = torch.profiler.profile(activities=kinds, record_shapes=True)  # shapes tell the LM head from the layers
    measure(work, VARIANTS["ours"], "training", lora, flat=0.0, seed=0, record=record)
    by = "self_device_time_total" if CUDA else "self_cpu_time_total"
    print(record.key_averages(group_by_input_shape=True).table(sort_by=by, row_limit=30, max_name_column_width=30))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what a GRPO step costs", allow_abbrev=False)
    parser.add_argument("--model", help="folder or hub id, with --traces (default: random weights)")
    parser.add_argument("--traces", type=Path, metavar="FILE", help="questions.jsonl of make_traces.py")
    parser.add_argument("--what", nargs="+", choices=MEASURED, default=["training", "step"])
    parser.add_argument("--weights", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="compared with the first")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this project, measured too")
    parser.add_argument("--flat", nargs="+", type=float, default=[0, 0.4, 0.7], help="shares of groups without spread")
    parser.add_argument("--questions", type=int, default=10, help=f"of a step, {GROUP} completions each")
    parser.add_argument("--tokens", type=int, help="of a completion at most (default: 512; random weights 200 or 48)")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions a forward pass")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of activations")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="where there are units")
    parser.add_argument("--rounds", type=int, default=3, help="how often the variants take turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured figure there as well")
    parser.add_argument("--profile", action="store_true", help="instead: the operators of a training half")
    flags = parser.parse_args(argv)
    if (flags.model is None) != (flags.traces is None):
        raise UserError("--model and --traces go together: the training half replays what the model answered")
    whole = (round(share * flags.questions) / flags.questions for share in flags.flat)
    flags.flat = [*dict.fromkeys(whole)]  # shares that so many groups can have
    flags.tokens = flags.tokens or (train_grpo.MAX_COMPLETION_TOKENS if flags.model else 200 if CUDA else 48)
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    variants = {key: VARIANTS[key] for key in flags.variants}
    if flags.against:
        variants["against"] = load_checkout(flags.against)
    recipe = train_grpo.default_recipe() | {"QUESTIONS_PER_STEP": flags.questions, "BF16": flags.bf16}
    recipe |= {"MICRO_BATCH": min(flags.micro_batch, flags.questions * GROUP), "MAX_COMPLETION_TOKENS": flags.tokens}
    recipe |= {"GRADIENT_CHECKPOINTING": flags.checkpointing}

    device, autocast = pick_device(cpu=False, bf16=flags.bf16)
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    precision = "float32 weights, bf16 autocast" if autocast else "float32"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"{machine}; {precision}; {versions}; {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory(prefix="bench_speed_") as folder:
        work = read_work(flags, recipe) if flags.model else make_work(flags, recipe, Path(folder))
        if flags.profile:
            return show_profile(work, "lora" in flags.weights[:1])
        mean = statistics.fmean(len(row) for group in work.completions.values() for row in group)
        print(
            f"{flags.model or 'random weights'}; {flags.questions} questions x {GROUP} completions of at most "
            f"{flags.tokens} tokens, the replayed ones {mean:.0f} on average; micro batches of "
            f"{recipe['MICRO_BATCH']}, checkpointing {'on' if flags.checkpointing else 'off'}\n{floor(work)}",
            flush=True,
        )
        runs: list[dict] = []
        order = product(range(flags.rounds), flags.what, flags.weights, variants.values(), flags.flat)
        for turn, what, weights, variant, flat in order:
            # TRL computes flat groups too, and generation knows nothing of them
            if flat != flags.flat[0] and (variant.trainer is GRPOTrainer or what == "generation"):
                continue
            if weights == "lora" and variant is VARIANTS["tutorial"] and len(variants) > 1:  # it trains all weights
                continue
            made = measure(work, variant, what, weights == "lora", flat, turn, nullcontext())
            runs.append({"what": what, "weights": weights, "variant": variant.name, "flat": flat, "figures": made})
            at = f"{what}, {weights}, {variant.name}, {flat:.0%} flat"
            print(f"  round {turn + 1}, {at}: {made[MEASURED[what]]:.2f} s", flush=True)
            if flags.json:  # what is there by now, lest an interrupted run be lost
                figures = {"machine": machine, "precision": precision, "versions": versions, "runs": runs}
                flags.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for what, weights in product(flags.what, flags.weights):
        print(f"\n{table(runs, what, weights)}")


if __name__ == "__main__":
    run(main)
