"""Ten steps of the real recipe at the true 0.5B shape with random weights: time and memory of a machine, no hub.

    python studies/check_gpu.py [TOKENIZER]    # a folder or hub id; default: the hub's Qwen/Qwen2.5-0.5B-Instruct

Random weights hardly ever end an answer, so every completion runs to its full length, and prompts are as long as
MAX_PROMPT_TOKENS allows: what is measured is the worst case of step time and peak memory, not learning. Anything that
follows the tokenizer goes to train_grpo.py. It needs 22 GB (LoRA: 5) where temporary files are kept, which TMPDIR
changes.
"""

import argparse
import bisect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import qwen

import train_grpo
from engine.console import UserError, run
from engine.questions import to_prompt, to_row
from engine.templates import PLAIN_TEMPLATE, encode, todays_prompt

ENDS = {"eos_token_id": 151645, "pad_token_id": 151643, "bos_token_id": None}
ROOT = Path(train_grpo.__file__).parent
STEPS = 10
START = """
import zlib
import train_grpo

def mark_reward(completions, **kwargs):  # random weights earn nothing, and what is rewarded alike is not trained on
    return [zlib.crc32(completion[0]["content"].encode()) % 97 / 97 for completion in completions]

rewards, weights = [mark_reward, *train_grpo.REWARDS[1:]], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
train_grpo.run(lambda: train_grpo.main(REWARDS=rewards, REWARD_WEIGHTS=weights, SAVE_LIMIT=1))
"""
QUESTION = "一列火车每小时行驶{a}公里，先行驶了{b}小时，休息之后又行驶了{c}小时，每张车票{d}元。它一共行驶了多少公里？"


def longest_questions(tokenizer: PreTrainedTokenizerBase, limit: int) -> list[str]:
    """400 different texts, as many characters each as prompts of `limit` tokens hold; every tenth one is measured."""
    texts = [QUESTION.format(a=100 + i, b=1 + i % 7, c=2 + i % 5, d=20 + i % 9) * (limit // 10) for i in range(400)]

    def tokens(length: int) -> int:
        return max(map(len, encode(tokenizer, [todays_prompt() + to_prompt(text[:length]) for text in texts[::10]])))

    length = bisect.bisect_right(range(min(map(len, texts))), limit, key=tokens) - 1
    return [text[: max(length, 0)] for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of ten steps; other flags go to train_grpo.py")
    parser.add_argument("tokenizer", nargs="?", default=train_grpo.MODEL, help="a folder or hub id")
    own, others = parser.parse_known_args()
    if taken := {"--model", "--dataset", "--output"} & {flag.split("=")[0] for flag in others}:
        raise UserError(f"{min(taken)}: the model, its questions and the output are made here; leave it out")
    tokenizer = AutoTokenizer.from_pretrained(own.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    texts = longest_questions(tokenizer, train_grpo.MAX_PROMPT_TOKENS)
    rows = [to_row(text, number) for number, text in enumerate(texts)]
    parts = {"train": rows[:384], "validation": rows[384:392], "test": rows[392:]}
    data = DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as name:
        folder = Path(name)
        data.save_to_disk(folder / "data")
        Qwen2ForCausalLM(Qwen2Config(**qwen.SHAPE, **ENDS)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        flags = ["--model", folder / "model", "--dataset", folder / "data", "--output", folder / "run"]
        flags += ["--max-steps", STEPS, *others]
        training = subprocess.run([sys.executable, "-c", START, *map(str, flags)], cwd=ROOT)
        if training.returncode:  # it has said why
            sys.exit(training.returncode)
        results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    for name in ("device", "step_seconds", "generated_tokens_per_second", "peak_memory_gb"):
        print(f"{name}: {results[name]}")


if __name__ == "__main__":
    run(main)
