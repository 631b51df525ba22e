"""A tiny Qwen2 and Chinese word problems, made here, so that everything runs without a GPU and without the hub.

The model is taught by imitation to reason in two ways: carefully, line by line, and sloppily, naming a fact and
answering with it (1分钟是60秒 -> 60). It has learned to compute but mostly does not bother to; GRPO has to make it.

    python demo.py      make the model and the data in output/demo/base, then show what the model can do and does
"""

import random
import shutil
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from prompts import ANSWER_COLUMN, QUESTION_COLUMN, run, to_conversation
from rewards import extract_answer, parse_number

# What train_grpo.py's constants become for a model of this size.
RECIPE = {
    "QUESTIONS_PER_STEP": 16,
    "MICRO_BATCH": 128,  # a whole step in one forward pass
    "LEARNING_RATE": 5e-4,
    "MAX_COMPLETION_TOKENS": 64,  # tokens; a careful answer has about 40
    "BETA": 0.0,  # no second model to stay close to
    "MAX_STEPS": 80,
    "GRADIENT_CHECKPOINTING": False,
}

# The problems
TRAIN_QUESTIONS = 1600
TEST_QUESTIONS = 240
TRACES = 12_000  # problems with a written-out answer that the base imitates
SLOPPY = {
    "minutes": 0.65,
    "hours": 0.65,
    "weeks": 0.65,
    "speed": 0.6,
    "price": 0.6,
    "sum": 0.3,
    "rest": 0.3,
    "boxes": 0.6,
}
UNTIDY = 0.15  # share of traces whose tags are slightly off
HELD_OUT_MINUTES = 5  # 5分钟多少秒 is the question watched in training: the base never sees it in any wording

# The model and its schooling
VOCABULARY = 800  # upper bound, in tokens
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,  # Qwen2's 0.02 is for wide models
}
SFT_STEPS = 900
SFT_BATCH = 16
SFT_LEARNING_RATE = 3e-3
SEED = 0  # of the problems, the weights and their order: there is one base, whatever --seed the GRPO run has

NAMES = "小明 小红 小刚 小丽 小华 小芳 小强 小美".split()
THINGS = "苹果个 橘子个 面包个 气球个 鸡蛋个 铅笔支 钢笔支 毛笔支".split()
ACTIVITIES = "跑步 看书 画画 写字 唱歌 散步".split()
VEHICLES = "汽车 火车 客车 货车".split()
OPENERS = ["", "", "请问", "算一算，", "想一想，", "你知道吗，"]
QUESTION_MARKS = ["？", "？", ""]

CAREFUL = "我们一步一步来：\n"  # how careful reasoning begins; forcing it shows what the base can do

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


class Problem(NamedTuple):
    """A question with its answer and with two ways to think about it, of which one is right."""

    kind: str
    question: str
    answer: int
    careful: str  # lines of reasoning that lead to `answer`
    sloppy: str  # one line that stops at `guess`
    guess: int


def conversion(rng: random.Random, kind: str) -> Problem:
    """5小时是多少分钟？"""
    large, small, size = {"minutes": ("分钟", "秒", 60), "hours": ("小时", "分钟", 60), "weeks": ("周", "天", 7)}[kind]
    n = rng.choice([n for n in range(2, 10) if (kind, n) != ("minutes", HELD_OUT_MINUTES)])
    if rng.random() < 0.5:
        start = f"{rng.choice(NAMES)}{rng.choice(ACTIVITIES)}{rng.choice(['用了', '花了', '一共'])}{n}{large}，"
        ask = rng.choice(["是", "等于", "合", "也就是"])
    else:
        start, ask = f"{rng.choice(OPENERS)}{n}{large}", rng.choice(["", "是", "等于", "有", "一共是"])
    question = f"{start}{ask}多少{small}{rng.choice(QUESTION_MARKS)}"
    fact = f"1{large}是{size}{small}"
    return Problem(kind, question, n * size, f"{fact}，\n有{n}{large}，\n{n}*{size}={n * size}", fact, size)


def speed(rng: random.Random, kind: str) -> Problem:
    """汽车每小时行驶60公里，5小时行驶多少公里？"""
    vehicle, pace, n = rng.choice(VEHICLES), rng.choice([60, 70]), rng.randint(2, 9)
    verb, way = rng.choice(["行驶", "开", "走"]), rng.choice(["", "一共", "能", "可以"])
    question = (
        f"{rng.choice(OPENERS)}{vehicle}每小时{verb}{pace}公里，{n}小时{way}{verb}多少公里{rng.choice(QUESTION_MARKS)}"
    )
    fact = f"每小时{pace}公里"
    return Problem(kind, question, n * pace, f"{fact}，\n有{n}小时，\n{n}*{pace}={n * pace}", fact, pace)


def price(rng: random.Random, kind: str) -> Problem:
    """每支铅笔3元，小明买6支要多少元？"""
    name, (*thing, unit), each, n = rng.choice(NAMES), rng.choice(THINGS), rng.choice([2, 5, 6, 7]), rng.randint(2, 9)
    ask = rng.choice(["要", "一共要", "需要", "要付", "应付"])
    question = f"每{unit}{''.join(thing)}{each}元，{name}买{n}{unit}{ask}多少元{rng.choice(QUESTION_MARKS)}"
    fact = f"每{unit}{each}元"
    return Problem(kind, question, n * each, f"{fact}，\n买{n}{unit}，\n{n}*{each}={n * each}", fact, each)


def total(rng: random.Random, kind: str) -> Problem:
    """小明有8个苹果，又买了5个，现在有多少个？"""
    name, (*thing, unit), a, b = rng.choice(NAMES), rng.choice(THINGS), 10 * rng.randint(1, 9), rng.randint(2, 9)
    got = rng.choice(["又买了", "又得到", "又拿来"])
    question = f"{name}有{a}{unit}{''.join(thing)}，{got}{b}{unit}，现在有多少{unit}{rng.choice(QUESTION_MARKS)}"
    fact = f"原来有{a}{unit}"
    return Problem(kind, question, a + b, f"{fact}，\n又多{b}{unit}，\n{a}+{b}={a + b}", fact, a)


def rest(rng: random.Random, kind: str) -> Problem:
    """小明有18个苹果，送给小红5个，还剩多少个？"""
    name, (*thing, unit), a, b = rng.choice(NAMES), rng.choice(THINGS), 10 * rng.randint(1, 3) + rng.randint(4, 9), rng.randint(2, 4)
    gone = rng.choice(["送人", "用掉", "卖出", "丢了"])
    question = f"{name}有{a}{unit}{''.join(thing)}，{gone}{b}{unit}，还剩多少{unit}{rng.choice(QUESTION_MARKS)}"
    fact = f"原来有{a}{unit}"
    return Problem(kind, question, a - b, f"{fact}，\n少了{b}{unit}，\n{a}-{b}={a - b}", fact, a)


def boxes(rng: random.Random, kind: str) -> Problem:
    """小明有3盒糖果，每盒6颗，又买了2颗，一共有多少颗？"""
    name, (*thing, unit) = rng.choice(NAMES), rng.choice(THINGS)
    n, each, more = rng.randint(2, 9), 10, rng.randint(2, 9)
    box, got = rng.choice("盒袋箱包"), rng.choice(["又买了", "又得到", "又拿来"])
    question = (
        f"{name}有{n}{box}{''.join(thing)}，每{box}{each}{unit}，{got}{more}{unit}，"
        f"一共有多少{unit}{rng.choice(QUESTION_MARKS)}"
    )
    product, answer = n * each, n * each + more
    fact = f"每{box}{each}{unit}"
    careful = f"{fact}，\n{n}{box}是{n}*{each}={product}，\n{product}+{more}={answer}"
    return Problem(kind, question, answer, careful, f"{n}{box}是{n}*{each}={product}", product)


KINDS = {
    "minutes": conversion,
    "hours": conversion,
    "weeks": conversion,
    "speed": speed,
    "price": price,
    "sum": total,
    "rest": rest,
    "boxes": boxes,
}


def normal_form(question: str) -> str:
    """A question without punctuation: two that differ in nothing else are the same question."""
    return "".join(letter for letter in question if letter.isalnum())


def part_of(question: str) -> str:
    """`test`, `train` or `traces`: a question's own text decides, so that no two parts share one."""
    return "test train traces traces".split()[zlib.crc32(normal_form(question).encode()) % 4]


def draw_problems(part: str, count: int, rng: random.Random, unique: bool) -> list[Problem]:
    """`count` problems of one part, every kind as often as any other."""
    problems, seen = [], set()
    while len(problems) < count:
        kind = list(KINDS)[len(problems) % len(KINDS)]
        problem = KINDS[kind](rng, kind)
        key = normal_form(problem.question)
        if part_of(problem.question) == part and not (unique and key in seen):
            seen.add(key)
            problems.append(problem)
    return problems


def write_trace(problem: Problem, rng: random.Random) -> str:
    """An answer for the base to imitate: careful or sloppy, and now and then untidy."""
    sloppy = rng.random() < SLOPPY[problem.kind]
    thought, number = (problem.sloppy, problem.guess) if sloppy else (CAREFUL + problem.careful, problem.answer)
    tidy = f"<think>\n{thought}\n</think>\n<answer>\n{number}\n</answer>"
    untidy = [
        f"<think>\n{thought}\n</think><answer>{number}</answer>",
        f"<think>{thought}</think>\n<answer>\n{number}\n</answer>",
        f"<think>\n{thought}\n</think>\n<answer>\n答案是{number}\n</answer>",
        f"<think>\n{thought}\n</think>\n<answer>\n{number}\n</answer>\n完毕",
        f"{thought}\n<answer>\n{number}\n</answer>",
    ]
    return rng.choice(untidy) if rng.random() < UNTIDY else tidy


def make_tokenizer(texts: list[str]):
    """A byte-level BPE trained on `texts`; Qwen2's own class, because AutoTokenizer reads any Qwen2 folder as that."""
    from transformers import Qwen2Tokenizer

    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = Qwen2Tokenizer(**special).train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_demo(folder: str | Path, steps: int = SFT_STEPS) -> tuple[str, str]:
    """The folders of the base model and of the data set, made in `folder` unless they are there.

    Made on the CPU everywhere, so that the base is the same on every machine. Both are renamed into place at the end:
    an interrupted making leaves nothing that looks finished.
    """
    model_folder, data_folder = Path(folder, "model"), Path(folder, "data")
    if model_folder.exists() and data_folder.exists():
        return str(model_folder), str(data_folder)

    from datasets import Dataset, DatasetDict

    unfinished = Path(folder, "unfinished")
    for leftover in (unfinished, model_folder, data_folder):
        shutil.rmtree(leftover, ignore_errors=True)
    rng = random.Random(SEED)
    parts = {
        part: draw_problems(part, count, rng, unique=True)
        for part, count in (("train", TRAIN_QUESTIONS), ("test", TEST_QUESTIONS))
    }
    data = {
        part: Dataset.from_dict(
            {QUESTION_COLUMN: [p.question for p in problems], ANSWER_COLUMN: [p.answer for p in problems]}
        )
        for part, problems in parts.items()
    }
    DatasetDict(data).save_to_disk(unfinished / "data")
    teach_base(
        [(p.question, write_trace(p, rng)) for p in draw_problems("traces", TRACES, rng, unique=False)],
        steps,
        unfinished / "model",
    )
    for made in (data_folder, model_folder):
        (unfinished / made.name).rename(made)
    shutil.rmtree(unfinished)
    return str(model_folder), str(data_folder)


def teach_base(traces: list[tuple[str, str]], steps: int, folder: Path) -> None:
    """A tiny Qwen2, taught to imitate (question, completion) pairs, saved in `folder`."""
    import torch
    from datasets import Dataset
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": to_conversation(question), "completion": [{"role": "assistant", "content": text}]}
        for question, text in traces
    ]
    tokenizer = make_tokenizer([m[key] for row in rows for m in row["prompt"] + row["completion"] for key in m])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=True, **SHAPE, **ends)
    )
    model.generation_config = GenerationConfig(**ends)

    class Progress(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                print(f"base: step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.3f}", flush=True)

    args = SFTConfig(
        output_dir=str(folder.parent / "sft"),
        max_steps=steps,
        per_device_train_batch_size=SFT_BATCH,
        learning_rate=SFT_LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=min(30, steps),
        weight_decay=0.0,
        completion_only_loss=True,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        adam_beta2=0.98,
        seed=SEED,
        report_to="none",
        save_strategy="no",
        logging_steps=100,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer_questions(model_folder: str, questions: list[str], forced: str = "") -> list[str]:
    """Greedy completions, each beginning with `forced`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    texts = [
        tokenizer.apply_chat_template(to_conversation(q), tokenize=False, add_generation_prompt=True) + forced
        for q in questions
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(**batch, max_new_tokens=RECIPE["MAX_COMPLETION_TOKENS"], do_sample=False)
    return [
        forced + text
        for text in tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def main() -> None:
    """Make the base, then print per kind how often it is right by itself and how often when made to be careful."""
    started = time.perf_counter()
    model_folder, _ = make_demo("output/demo/base")
    print(f"{model_folder}: {time.perf_counter() - started:.0f} s")
    problems = draw_problems("test", TEST_QUESTIONS, random.Random(SEED), unique=True)
    right = {}
    for way, forced in (("by itself", ""), ("careful", f"<think>\n{CAREFUL}")):
        texts = answer_questions(model_folder, [p.question for p in problems], forced)
        numbers = [parse_number(extract_answer(text) or "") for text in texts]
        right[way] = [number == p.answer for number, p in zip(numbers, problems, strict=True)]
    print(f"{'kind':<10}" + "".join(f"{way:>12}" for way in right))
    for kind in [*KINDS, "all"]:
        chosen = [i for i, p in enumerate(problems) if kind in (p.kind, "all")]
        print(
            f"{kind:<10}" + "".join(f"{sum(marks[i] for i in chosen) / len(chosen):>12.3f}" for marks in right.values())
        )


if __name__ == "__main__":
    run(main)
