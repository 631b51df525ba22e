"""What one GRPO step costs: TRL as it comes against this project, and against what this machine could do at best.

    python studies/bench_step.py [--json FILE]

Random weights, nothing is downloaded: on CUDA the true shape of Qwen2.5-0.5B, on a CPU the demo's. First the decode
loop must agree with `model.generate`; then come a step, an evaluation, rows of unequal length, growth with completions
and lengths, and on CUDA the memory of the default recipe. Variants take turns in one process, each with a fresh model.
The end token lies one past the logits: its code runs and never fires, so that all variants make equally many tokens
(asserted), but for the rows of unequal length. On an H200 all of it should take less than nine minutes.
"""

import argparse
import gc
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qwen
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from engine import demo
from engine.rollout import PlainSampler, Rollout, Sampler
from engine.trainer import CarefulTrainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LOW = torch.bfloat16 if CUDA else None  # the precision of evaluation
if CUDA:
    torch.backends.cuda.enable_cudnn_sdp(False)  # as models.pick_device does
DEMO = {name: size for name, size in demo.SHAPE.items() if name != "initializer_range"}
DEMO |= {"vocab_size": demo.VOCABULARY, "tie_word_embeddings": True}
SHAPE = qwen.SHAPE if CUDA else DEMO

# The reference step
COMPLETIONS, GROUP, LENGTH = (64, 16, 200) if CUDA else (128, 8, 48)
PROMPT_TOKENS = (100, 250) if CUDA else (40, 60)  # shortest and longest
STEPS, WARM, ROUNDS = (4, 2, 2) if CUDA else (4, 1, 3)  # of which the first WARM are not counted
ROOMY = not CUDA or torch.cuda.get_device_properties(0).total_memory > 60e9
TUTORIAL = {"micro": 16, "gradient_checkpointing": True}  # its one prompt at a time, and TRL's default
OURS = {"micro": COMPLETIONS if ROOMY else 8, "gradient_checkpointing": not ROOMY}
VARIANTS = {
    "TRL, tutorial's settings": TUTORIAL,
    "TRL, our settings": OURS,
    "ours": OURS | {"fast": True},
}
if CUDA:
    VARIANTS["ours, no graph"] = OURS | {"fast": True, "graph": False}
    VARIANTS["ours, torch_compile"] = OURS | {"fast": True, "torch_compile": True, "pad_to_multiple_of": 64}
else:  # the demo's precision
    VARIANTS["TRL, ours, float32"] = OURS | {"bf16": False}
    VARIANTS["ours, float32"] = OURS | {"fast": True, "bf16": False}
EVAL_QUESTIONS, EVAL_LENGTH = 200, 256 if CUDA else 48
GROWTH_COMPLETIONS, GROWTH_LENGTHS = ((16, 64, 256), (128, 256, 512)) if CUDA else ((16, 64, 256), (16, 32, 64))
RECIPE = {"completions": 256, "group": 8, "length": 512, "micro": 16, "beta": 0.0, "prompt_tokens": (150, 256)}


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def make_tokenizer() -> PreTrainedTokenizerFast:
    size = SHAPE["vocab_size"]
    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, 700)} | {"<eos>": size}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=template
    )


def make_model(shape: dict = SHAPE, spread: float = 0.02) -> Qwen2ForCausalLM:
    """A new model and a new config every time: a Trainer writes use_cache=False into the config it is given."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    with DEVICE:
        return Qwen2ForCausalLM(Qwen2Config(**shape | ends, initializer_range=spread))


def draw_prompts(n: int, shortest: int, longest: int) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(1, 700) for _ in range(draw.randint(shortest, longest))] for _ in range(n)]


def check() -> None:
    """Greedy equals `model.generate` in float32 on mixed lengths, also after longer prompts; a seed repeats itself."""
    model = make_model(DEMO, spread=0.2).eval()  # wide weights: no two logits so close that rounding decides
    plain, ours = PlainSampler(model, make_tokenizer()), Sampler(model, make_tokenizer())
    for prompts in (draw_prompts(9, 1, 30), draw_prompts(5, 20, 60), draw_prompts(12, 1, 10) * 2):
        assert ours.generate(prompts, 40) == plain.generate(prompts, 40), "the loop disagrees with model.generate"
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ours.generate(prompts, 40, temperature=1.0))
    assert drawn[0] == drawn[1] != drawn[2], "sampling does not follow the seed"
    if CUDA:
        assert ours.use_graph and set(ours.graphs) == {True, False}, "the decode step was not captured"
    print(
        "greedy decoding equals model.generate; a seed repeats itself" + ", with the captured graph" * CUDA, flush=True
    )


def check_true_shape() -> None:
    """Under bf16 autocast each greedy token is, but for rounding, what the trainer's own forward likes best there.

    On CUDA with the captured graph, and one step more that may not make the GPU wait for the host.
    """
    model, tokenizer = make_model(spread=0.05).eval(), make_tokenizer()
    sampler, prompts = Sampler(model, tokenizer, torch.bfloat16), draw_prompts(16, *PROMPT_TOKENS)
    gaps = []
    for prompt, completion in zip(prompts, sampler.generate(prompts, 32), strict=True):
        text = torch.tensor([prompt + completion], device=DEVICE)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(text).logits[0, len(prompt) - 1 : -1].float()  # (tokens, vocabulary)
        chosen = logits[torch.arange(len(completion)), torch.tensor(completion)]
        gaps.append(((logits.max(-1).values - chosen) / logits.std(-1)).mean().item())
    assert statistics.fmean(gaps) < 0.05, f"the loop departs from a teacher-forced forward: {gaps}"
    if CUDA and sampler.batch is not None:
        torch.cuda.set_sync_debug_mode("error")
        sampler.step(sampler.batch)
        torch.cuda.set_sync_debug_mode("default")
    print(
        f"under bf16 autocast the chosen tokens lie {statistics.fmean(gaps):.4f} standard deviations of the logits "
        "below the best ones of a teacher-forced forward",
        flush=True,
    )


def reward(completion_ids: list[list[int]], **_) -> list[float]:
    return [sum(ids) % 97 / 97 for ids in completion_ids]


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.start = now()

    def on_step_end(self, *_, **__) -> None:
        self.steps.append(now() - self.start)


def watch(trainer: GRPOTrainer) -> tuple[Clock, list[float], list[int]]:
    """From now on: seconds of its steps, seconds of each generation, and tokens of each micro batch."""
    clock, generation, tokens = Clock(), [], []

    def timed(generate: Callable, *args) -> tuple:
        start = now()
        made = generate(*args)
        generation.append(now() - start)
        return made

    def counted(loss: Callable, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        tokens.append(int(inputs["completion_mask"].sum()))
        return loss(model, inputs)

    trainer._generate = partial(timed, trainer._generate)
    trainer._compute_loss = partial(counted, trainer._compute_loss)
    trainer.add_callback(clock)
    return clock, generation, tokens


def run(
    micro: int,
    fast: bool = False,
    graph: bool = True,
    bf16: bool = True,
    completions: int = COMPLETIONS,
    group: int = GROUP,
    length: int = LENGTH,
    prompt_tokens: tuple[int, int] = PROMPT_TOKENS,
    steps: int = STEPS,
    **settings,
) -> dict:
    """Train `steps` steps; seconds of each (`step`), of its generation (`gen`), and the peak memory in GB."""
    prompts = draw_prompts(256, *prompt_tokens)
    rows = [{"prompt": [{"role": "user", "content": " ".join(f"w{i}" for i in ids)}]} for ids in prompts]
    config = GRPOConfig(
        tempfile.gettempdir(),  # nothing is written
        use_cpu=not CUDA,
        bf16=bf16,
        per_device_train_batch_size=min(micro, completions),
        gradient_accumulation_steps=max(completions // micro, 1),
        num_generations=group,
        max_completion_length=length,
        max_steps=steps,
        learning_rate=1e-6,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    rollout = Rollout() if fast else None
    trainer = (CarefulTrainer if fast else GRPOTrainer)(
        model=make_model(),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        rollout_func=rollout,
    )
    if fast:
        rollout.sampler(trainer).use_graph &= graph
    clock, generation, tokens = watch(trainer)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert sum(tokens) == steps * completions * length, "not the same work"
    assert not (CUDA and fast and graph) or rollout.sampler(trainer).use_graph, "the graph was lost on the way"
    peak = torch.cuda.max_memory_reserved() / 1e9 if CUDA else 0.0
    del trainer, rollout
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return {"step": clock.steps, "gen": generation, "peak": peak}


def floor() -> dict[str, float]:
    """Seconds that no program can beat here, at the memory and matmul rates measured now."""
    n, m = (2**28, 8192) if CUDA else (2**24, 1024)
    width, x = (2 if CUDA else 4), torch.ones(n, device=DEVICE)
    a = torch.randn(m, m, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32)
    y = torch.empty_like(x)

    def seconds(work: Callable) -> float:
        work()
        start = now()
        for _ in range(10):
            work()
        return (now() - start) / 10

    rate, flops = 8 * n / seconds(lambda: y.copy_(x)), 2 * m**3 / seconds(lambda: a @ a)
    layers, hidden, heads = SHAPE["num_hidden_layers"], SHAPE["hidden_size"], SHAPE["num_attention_heads"]
    kv_width = SHAPE["num_key_value_heads"] * hidden // heads
    head = SHAPE["vocab_size"] * hidden
    body = layers * (2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * SHAPE["intermediate_size"])
    prompt = sum(PROMPT_TOKENS) / 2
    context, total = prompt + LENGTH / 2, prompt + LENGTH
    cache = 2 * width * layers * kv_width * COMPLETIONS * context
    decode = LENGTH * (width * (body + head) + cache + width * COMPLETIONS * SHAPE["vocab_size"]) / rate
    decode = max(decode, 2 * (body + head) * COMPLETIONS * LENGTH / flops)  # on a CPU arithmetic binds, not memory
    prefill = 2 * body * COMPLETIONS / GROUP * prompt / flops
    train = COMPLETIONS * (6 * body * total + 8 * head * LENGTH + 7 * total**2 * hidden * layers) / flops
    adam = 40 * (body + head) / rate
    return {
        "decode": decode,
        "prefill": prefill,
        "train": train,
        "adam": adam,
        "GB/s": rate / 1e9,
        "TFLOP/s": flops / 1e12,
    }


def bench_steps() -> dict:
    """The variants in turn, and their table."""
    names, results = list(VARIANTS), {name: {"step": [], "gen": [], "peak": 0.0} for name in VARIANTS}
    for turn in range(ROUNDS):
        for name in names:
            if turn and "torch_compile" in VARIANTS[name]:
                continue  # compiling takes longer than all else
            try:
                made = run(**VARIANTS[name])
            except RuntimeError as error:  # out of memory, or a compiler that gives up
                print(f"  turn {turn + 1}, {name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            for key in ("step", "gen"):
                results[name][key] += made[key][WARM:]
            results[name]["peak"] = max(results[name]["peak"], made["peak"])
            print(f"  turn {turn + 1}, {name}: {' '.join(f'{s:.2f}' for s in made['step'])} s", flush=True)
    best = floor()
    lowest = best["decode"] + best["prefill"] + best["train"] + best["adam"]
    print(
        f"\nA step of {COMPLETIONS} completions of {LENGTH} tokens, {GROUP} to each prompt of {PROMPT_TOKENS} tokens\n"
        f"floor {lowest:.3f} s: decode {best['decode']:.3f}, prefill {best['prefill']:.3f}, forward and backward "
        f"{best['train']:.3f}, AdamW {best['adam']:.3f} (at {best['GB/s']:.0f} GB/s, {best['TFLOP/s']:.2f} TFLOP/s)\n"
        f"{'medians':26}{'step s':>8}{'gen s':>8}{'rest s':>8}{'tokens/s':>10}{'peak GB':>9}{'x floor':>9}{'ratio':>7}"
        "  spread of step"
    )
    base = statistics.median(results[names[0]]["step"])
    for name, result in results.items():
        if not result["step"]:
            continue
        step, gen = statistics.median(result["step"]), statistics.median(result["gen"])
        peak = f"{result['peak']:.1f}" if CUDA else "-"
        print(
            f"{name:26}{step:8.3f}{gen:8.3f}{step - gen:8.3f}{COMPLETIONS * LENGTH / gen:10.0f}{peak:>9}"
            f"{step / lowest:9.1f}{base / step:7.2f}  {min(result['step']):.3f} - {max(result['step']):.3f}"
        )
    if not CUDA:
        plain, ours = (results[name] for name in ("TRL, ours, float32", "ours, float32"))
        ratios = {key: [a / b for a, b in zip(plain[key], ours[key], strict=True)] for key in ("gen", "step")}
        print(
            "at the demo's precision, turn by turn: "
            + ", ".join(
                f"{key} {statistics.median(r):.2f} x ({min(r):.2f} - {max(r):.2f})" for key, r in ratios.items()
            )
        )
    return {"floor": best, "variants": results}


def bench_evaluation() -> dict:
    """Greedy answers to distinct questions in one batch."""
    model, prompts = make_model().eval(), draw_prompts(EVAL_QUESTIONS, *PROMPT_TOKENS)
    samplers = {kind.__name__: kind(model, make_tokenizer(), LOW) for kind in (PlainSampler, Sampler)}
    seconds = {name: [] for name in samplers}
    for _ in range(3):
        for name, sampler in samplers.items():
            start = now()
            made = sampler.generate(prompts, EVAL_LENGTH)
            seconds[name].append(now() - start)
            assert all(len(row) == EVAL_LENGTH for row in made), "not the same work"
    plain, ours = (statistics.median(times[1:]) for times in seconds.values())
    print(
        f"\nEvaluation of {EVAL_QUESTIONS} questions, {EVAL_LENGTH} tokens each: "
        f"model.generate {plain:.2f} s, ours {ours:.2f} s, {plain / ours:.2f} x",
        flush=True,
    )
    return seconds


def bench_spread() -> dict:
    """Generation where rows end by themselves: a part of the vocabulary ends a row, so that lengths are geometric."""
    model, prompts = (
        make_model(),
        [ids for ids in draw_prompts(COMPLETIONS // GROUP, *PROMPT_TOKENS) for _ in range(GROUP)],
    )
    model.generation_config.eos_token_id = list(range(1, SHAPE["vocab_size"], LENGTH // 2))
    samplers = {kind.__name__: kind(model, make_tokenizer(), LOW) for kind in (PlainSampler, Sampler)}
    rates = {name: [] for name in samplers}
    for _ in range(6):
        for name, sampler in samplers.items():
            start = now()
            made = sampler.generate(prompts, LENGTH, temperature=1.0)
            rates[name].append(sum(map(len, made)) / (now() - start))
    lengths = sorted(map(len, made))
    ratios = [ours / plain for plain, ours in zip(*(rate[1:] for rate in rates.values()), strict=True)]
    plain, ours = (statistics.median(rate[1:]) for rate in rates.values())
    print(
        f"\nGeneration of {COMPLETIONS} rows that end by themselves (a quarter by {lengths[COMPLETIONS // 4]} tokens, "
        f"half by {lengths[COMPLETIONS // 2]}, the last at {lengths[-1]}): model.generate {plain:.0f} tokens/s, "
        f"ours {ours:.0f}, {statistics.median(ratios):.2f} x ({min(ratios):.2f} - {max(ratios):.2f})",
        flush=True,
    )
    return {"rates": rates, "lengths": lengths}


def bench_growth() -> list[dict]:
    """Ours, with one quantity varied at a time."""
    print(f"\nGrowth of ours{'' if CUDA else ' (float32; lengths scaled down for a CPU)'}")
    print(f"{'completions':>11}{'tokens':>8}{'step s':>9}{'gen s':>8}{'tokens/s':>10}")
    sizes = [(n, LENGTH) for n in GROWTH_COMPLETIONS] + [(64, length) for length in GROWTH_LENGTHS]
    rows = []
    for completions, length in sizes:
        made = run(**OURS | {"fast": True, "bf16": CUDA, "completions": completions, "length": length, "steps": 3})
        step, gen = min(made["step"][1:]), min(made["gen"][1:])
        rows.append({"completions": completions, "length": length, "step": step, "gen": gen})
        print(f"{completions:11}{length:8}{step:9.3f}{gen:8.3f}{completions * length / gen:10.0f}", flush=True)
    return rows


def bench_memory() -> dict[str, float | None]:
    """Peak memory in GB of the default recipe, with and without checkpointing; None where the card has too little."""
    peaks = {}
    for checkpointing in (True, False):
        try:
            peak = run(**RECIPE, gradient_checkpointing=checkpointing, fast=True, steps=2)["peak"]
        except torch.OutOfMemoryError:
            peak = None
        peaks[f"gradient_checkpointing={checkpointing}"] = peak
    said = [f"{name} {'too much for this card' if peak is None else f'{peak:.1f} GB'}" for name, peak in peaks.items()]
    print(
        f"\nPeak memory of the default recipe ({RECIPE['completions']} completions of {RECIPE['length']} tokens, "
        f"micro batch {RECIPE['micro']}): {', '.join(said)}"
    )
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description="What one GRPO step costs", allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="write every measured figure there as well")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"{machine}; {versions}; {time.strftime('%Y-%m-%d')}")
    started = time.perf_counter()
    check()
    check_true_shape()
    figures = {"machine": machine, "versions": versions, "steps": bench_steps(), "evaluation": bench_evaluation()}
    figures |= {"spread": bench_spread(), "growth": bench_growth()}
    if CUDA:
        figures["memory"] = bench_memory()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    if flags.json:
        Path(flags.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
