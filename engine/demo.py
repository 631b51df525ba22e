"""A tiny Qwen2 and Chinese word problems, both made here: the demo needs no GPU and no network.

The model learns by imitation to compute and to answer in two ways. The careful way goes line by line. The sloppy way
says the first fact that comes to mind (1分钟是60秒 -> 60), as the tutorial's model did, and is the more frequent one.
GRPO teaches the careful way.
"""

import hashlib
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from engine.questions import to_prompt, to_row
from engine.templates import CHATML_TEMPLATE, carry_prompt, todays_prompt

# The data set
TRAIN_QUESTIONS = 1840  # the last 240 of them are the development questions
TEST_QUESTIONS = 240
SEED = 0  # of the questions, the traces, the weights and their training; --seed changes the GRPO run only

# The constants of train_grpo.py that the demo changes
RECIPE = {
    "OUTPUT_DIR": "output/demo",
    "QUESTIONS_PER_STEP": 16,
    "MICRO_BATCH": 128,  # the whole step at once
    "GRADIENT_CHECKPOINTING": False,
    "BF16": False,  # the same bits on every CPU, and as fast for so small a model
    "LEARNING_RATE": 5e-4,
    "MAX_STEPS": 50,
    "EVAL_EVERY": 5,
    "DEV_QUESTIONS": 240,
    "MAX_COMPLETION_TOKENS": 64,  # a careful answer has about 35
}

# Those of train_sft.py
SFT_RECIPE = {
    "OUTPUT_DIR": RECIPE["OUTPUT_DIR"],
    "LEARNING_RATE": 1e-3,
    "EVAL_EVERY": 25,
}

# The model
VOCABULARY = 800  # tokens, 256 of them bytes
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,  # so narrow a model learns faster with it than with Qwen2's 0.02
}

# Its training by imitation
TRACES = 6400  # questions with a written answer; some kinds have hardly more
SLOPPY, SLOPPY_SUMS = 0.6, 0.3  # share of sloppy traces; in sums and differences the careful way prevails
UNTIDY = 0.15  # share of traces that break the format a little
SFT_STEPS = 750
SFT_BATCH = 16  # traces
SFT_LEARNING_RATE = 3e-3  # peak

CAREFUL = "我们一步一步来：\n"  # how careful reasoning begins

KINDS = ["minutes", "hours", "weeks", "speed", "price", "sum", "rest", "boxes"]
CONVERSIONS = {"minutes": ("分钟", "秒", 60), "hours": ("小时", "分钟", 60), "weeks": ("周", "天", 7)}
WORDS = {
    "lead": "||请问|算一算，|想一想，|你知道吗，",
    "name": "小明|小红|小刚|小丽|小华|小芳|小强|小美",
    "act": "跑步|看书|画画|写字|唱歌|散步",
    "spent": "用了|花了|一共",
    "be": "|是|等于|有|一共是",
    "vehicle": "汽车|火车|客车|货车",
    "drive": "行驶|开|走",
    "can": "|一共|能|可以",
    "cost": "要|一共要|需要|要付|应付",
    "thing": "苹果个|橘子个|面包个|气球个|鸡蛋个|铅笔支|钢笔支|毛笔支",
    "got": "又买了|又得到|又拿来",
    "gone": "送人|用掉|卖出|丢了",
    "box": "盒|袋|箱|包",
    "end": "？|？|",
}


class Problem(NamedTuple):
    """A question with its label, and a completion for the base to imitate."""

    kind: str
    question: str
    answer: int
    trace: str


def make_problem(kind: str, rng: random.Random) -> Problem:
    """A problem of one kind in random words. Its arithmetic is easy, because RL teaches no multiplication tables."""
    w = SimpleNamespace(**{name: rng.choice(choices.split("|")) for name, choices in WORDS.items()})
    thing, unit = w.thing[:-1], w.thing[-1]
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if kind in CONVERSIONS:
        large, small, b = CONVERSIONS[kind]
        # 5分钟多少秒 is the probe of the training and must not be seen in any wording; 5*60 occurs in other kinds
        a = rng.choice([2, 3, 4, 6, 7, 8, 9]) if kind == "minutes" else a
        start = rng.choice([f"{w.lead}{a}{large}", f"{w.name}{w.act}{w.spent}{a}{large}，"])
        question = f"{start}{w.be}多少{small}"
        sign, fact, more = "*", f"1{large}是{b}{small}", f"有{a}{large}"
    elif kind == "speed":
        b = rng.choice([60, 70])
        question = f"{w.lead}{w.vehicle}每小时{w.drive}{b}公里，{a}小时{w.can}{w.drive}多少公里"
        sign, fact, more = "*", f"每小时{b}公里", f"有{a}小时"
    elif kind == "price":
        b = rng.choice([2, 5])
        question = f"每{unit}{thing}{b}元，{w.name}买{a}{unit}{w.cost}多少元"
        sign, fact, more = "*", f"每{unit}{b}元", f"买{a}{unit}"
    elif kind == "sum":
        a *= 10
        question = f"{w.name}有{a}{unit}{thing}，{w.got}{b}{unit}，现在有多少{unit}"
        sign, fact, more = "+", f"原来有{a}{unit}", f"又多{b}{unit}"
    elif kind == "rest":
        a, b = 10 * rng.randint(1, 3) + rng.randint(4, 9), rng.randint(2, 4)  # nothing to borrow
        question = f"{w.name}有{a}{unit}{thing}，{w.gone}{b}{unit}，还剩多少{unit}"
        sign, fact, more = "-", f"原来有{a}{unit}", f"少了{b}{unit}"
    else:  # boxes: two steps, of which the sloppy answer makes one
        question = f"{w.name}有{a}{w.box}{thing}，每{w.box}10{unit}，{w.got}{b}{unit}，一共有多少{unit}"
        sign, fact, more = "+", f"{a}{w.box}是{a}*10={a * 10}", f"又多{b}{unit}"
        a *= 10
    answer = {"*": a * b, "+": a + b, "-": a - b}[sign]
    guess = b if sign == "*" else a  # the number at the end of the fact
    careful = f"{CAREFUL}{fact}，\n{more}，\n{a}{sign}{b}={answer}"
    sloppy = rng.random() < (SLOPPY_SUMS if kind in ("sum", "rest") else SLOPPY)
    trace = write_trace(fact, guess, rng) if sloppy else write_trace(careful, answer, rng)
    return Problem(kind, question + w.end, answer, trace)


def write_trace(thought: str, number: int, rng: random.Random) -> str:
    """The completion; a share of UNTIDY has a fault in its format."""
    untidy = [
        f"<think>\n{thought}\n</think><answer>{number}</answer>",
        f"<think>{thought}</think>\n<answer>\n{number}\n</answer>",
        f"<think>\n{thought}\n</think>\n<answer>\n答案是{number}\n</answer>",
        f"<think>\n{thought}\n</think>\n<answer>\n{number}\n</answer>\n完毕",
        f"{thought}\n<answer>\n{number}\n</answer>",
    ]
    tidy = f"<think>\n{thought}\n</think>\n<answer>\n{number}\n</answer>"
    return rng.choice(untidy) if rng.random() < UNTIDY else tidy


def normal_form(question: str) -> str:
    """The question without its punctuation. Questions that differ only there count as one."""
    return "".join(filter(str.isalnum, question))


def draw_problems(part: str, count: int) -> list[Problem]:
    """Different questions of one part (`test`, `train` or `traces`), equally many of each kind.

    A hash of the question decides to which part it belongs, so no two parts share a question.
    """
    rng, problems = random.Random(f"{SEED} {part}"), {}
    while len(problems) < count:
        problem = make_problem(KINDS[len(problems) % len(KINDS)], rng)
        key = normal_form(problem.question)
        if ("test", "train", "traces", "traces")[zlib.crc32(key.encode()) % 4] == part:
            problems.setdefault(key, problem)
    return list(problems.values())


def folders(cache: Path) -> tuple[str, str]:
    """The folders of the demo's model and data set, made already or not."""
    return str(cache / "model"), str(cache / "data")


def make_demo(cache: str | Path, steps: int = SFT_STEPS) -> tuple[str, str]:
    """Make the demo's model and data set in `cache` where they are not there yet; returns their folders."""
    model, data = folders(Path(cache))
    make_once(Path(data), save_questions)
    make_once(Path(model), lambda folder: teach_base(draw_problems("traces", TRACES), steps, folder))
    return model, data


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Call `make` for a folder that is not there, or that was made with another fingerprint.

    The folder gets its name when it is complete. One without the file made_by belongs to a person and is left alone.
    """
    made_by, unfinished = folder / "made_by", folder.with_name(f"unfinished-{folder.name}")
    if folder.exists() and (not made_by.exists() or made_by.read_text() == fingerprint()):
        return
    print(f"base: making {folder}" + (" anew, because the demo has changed" if folder.exists() else ""), flush=True)
    for leftover in (folder, unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    make(unfinished)
    (unfinished / made_by.name).write_text(fingerprint())
    unfinished.rename(folder)


def fingerprint() -> str:
    """A hash of what the demo's models depend on: the prompt, pretraining.py, and this file without its recipes."""
    files = [Path(__file__).with_name(name) for name in ("demo.py", "pretraining.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    source = re.sub(r"^(SFT_)?RECIPE = \{.*?^\}", "", source, flags=re.M | re.S)
    return hashlib.sha256((source + CHATML_TEMPLATE + str(todays_prompt())).encode()).hexdigest()


def save_questions(folder: Path) -> None:
    """Write the data set: the splits `train` and `test`, with the columns of the one on the hub."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    data = DatasetDict()
    for part, count in (("train", TRAIN_QUESTIONS), ("test", TEST_QUESTIONS)):
        data[part] = Dataset.from_list([to_row(p.question, p.answer) for p in draw_problems(part, count)])
    data.save_to_disk(folder)


def make_untrained(texts: Iterable[str], shape: dict, end: str) -> tuple:
    """A Qwen2 with random weights, and a tokenizer whose vocabulary is learned from `texts`.

    Args:
        shape: the arguments of Qwen2Config for the size.
        end: the token that ends a text. <|endoftext|> makes a base model: as in Qwen's, padding is the same token.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Qwen2's own class, because AutoTokenizer reads the folder of a Qwen2 as that class
    special = {"eos_token": end, "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = transformers.Qwen2Tokenizer(**special).train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    ends = {"eos_token_id": tokenizer.eos_token_id}
    if tokenizer.pad_token != end:  # else the embedding of the end token would not be trained
        ends["pad_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(SEED)
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ends)
    model = transformers.Qwen2ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**ends)
    return model, tokenizer


def teach_base(traces: list[Problem], steps: int, folder: Path) -> None:
    """Train a model to imitate the traces, on one CPU thread, so that every machine makes the same model."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": to_prompt(p.question), "completion": [{"role": "assistant", "content": p.trace}]} for p in traces
    ]
    turns = (turn for row in rows for turn in todays_prompt() + row["prompt"] + row["completion"])
    model, tokenizer = make_untrained((text for turn in turns for text in turn.values()), SHAPE, "<|im_end|>")
    tokenizer.chat_template = carry_prompt(CHATML_TEMPLATE, todays_prompt())

    class Progress(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                print(f"base: step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}", flush=True)

    config = SFTConfig(
        output_dir=str(folder),
        seed=SEED,
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        per_device_train_batch_size=SFT_BATCH,
        activation_checkpointing=False,
        learning_rate=SFT_LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        adam_beta2=0.98,
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[Progress()])
    trainer.remove_callback(transformers.PrinterCallback)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast for so small a model, and several times faster on a busy machine
    trainer.train()
    torch.set_num_threads(threads)
    model.config.use_cache = True  # the trainer switched it off
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
