"""Talk to a model under the prompt of its training: one question a line, no history.

python chat.py output/grpo
echo 5分钟多少秒 | python chat.py output/grpo
"""

import argparse
import contextlib
import os
import sys

from engine.console import run
from engine.questions import to_prompt
from engine.templates import encode, trained_recipe

MAX_TOKENS: int = 1024  # of an answer, for a model that was not trained here


def main() -> None:
    parser = argparse.ArgumentParser(description="ask a model", allow_abbrev=False)
    parser.add_argument("model", help="hub id, saved model, checkpoint or adapter folder")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, 1 is as in training (default: 0)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    flags = parser.parse_args()
    if flags.temperature < 0:
        parser.error(f"--temperature {flags.temperature}: 0 or more")

    with contextlib.suppress(ImportError):  # Windows' console edits lines itself
        import readline  # noqa: F401  input() then has a history, and erases a Chinese character's both columns
    import torch
    from transformers import TextStreamer

    from engine.models import load_model, pick_device
    from engine.rollout import make_sampler

    model, tokenizer = load_model(flags.model)
    device, autocast = pick_device(flags.cpu, trained_recipe(flags.model).get("BF16", True))
    sampler = make_sampler(model.to(device).eval(), tokenizer, autocast)
    tokens = model.generation_config.max_new_tokens or MAX_TOKENS
    prompt = ">>> " if sys.stdin.isatty() else ""  # a pipe gets answers only
    if prompt:
        print("One question a line; exit or Ctrl-D leaves.")
    sys.stdin.reconfigure(errors="replace")  # U+FFFD stands for bytes that are no text: they cost only their line
    while (question := input(prompt).lstrip("\ufeff").strip()) != "exit":  # some editors begin a file with U+FEFF
        if "\ufffd" in question:
            print(f"skipped, for it is not {sys.stdin.encoding.upper()}: {question}", file=sys.stderr)
        if not question or "\ufffd" in question:
            continue
        (ids,) = encode(tokenizer, [to_prompt(question)])
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # holds back half a Chinese character
        for token in sampler.stream(ids, tokens, flags.temperature):
            streamer.put(torch.tensor([token]))
        streamer.end()


if __name__ == "__main__":
    try:
        run(main, outlive_reader=False)
    except EOFError:  # Ctrl-D, the end of a pipe
        if sys.stdin.isatty():
            print()
    except BrokenPipeError:  # whoever reads our answers, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends
