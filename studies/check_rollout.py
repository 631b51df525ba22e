"""Does the decode loop, with its captured CUDA graph where there is a GPU, agree with transformers on this machine?

python studies/check_rollout.py    # a minute; random weights, of Qwen2.5-0.5B's shape on CUDA
"""

import os
import random
import statistics
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import qwen
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine import demo
from engine.models import pick_device
from engine.rollout import PlainSampler, Sampler

SMALL = demo.SHAPE | {"vocab_size": demo.VOCABULARY, "tie_word_embeddings": True}


def make_model(shape: dict, spread: float, device: torch.device) -> Qwen2ForCausalLM:
    """Random weights whose standard deviation is `spread`. No token ends a completion."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    with device:
        return Qwen2ForCausalLM(Qwen2Config(**shape | ends | {"initializer_range": spread})).eval()


def draw_prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Token ids of as many prompts."""
    draw = random.Random(7)
    return [draw.choices(qwen.WORDS, k=draw.randint(shortest, longest)) for _ in range(count)]


def check_tokens(device: torch.device) -> None:
    """In float32 greedy tokens are those of `model.generate`, also after longer prompts; a seed repeats itself."""
    model, tokenizer = make_model(SMALL, 0.2, device), qwen.make_tokenizer()  # so wide that rounding decides nothing
    tokenizer.eos_token = None
    plain, ours = PlainSampler(model, tokenizer), Sampler(model, tokenizer)
    for prompts in (draw_prompts(9, 1, 30), draw_prompts(5, 20, 60), draw_prompts(12, 1, 10) * 2):
        assert ours.generate(prompts, 40) == plain.generate(prompts, 40), "the loop departs from model.generate"
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ours.generate(prompts, 40, temperature=1.0))
    assert drawn[0] == drawn[1] != drawn[2], "sampling does not follow the seed"
    captured = device.type == "cuda"
    assert not captured or ours.use_graph and set(ours.graphs) == {True, False}, "the decode step was not captured"
    print("greedy decoding equals model.generate; a seed repeats itself" + ", with the captured graph" * captured)


def check_precision(device: torch.device) -> None:
    """Under bf16 each greedy token is, but for rounding, the likeliest of the trainer's own forward there.

    On CUDA one step more may not make the GPU wait for the host.
    """
    model, tokenizer = make_model(qwen.SHAPE if device.type == "cuda" else SMALL, 0.05, device), qwen.make_tokenizer()
    sampler, prompts, gaps = Sampler(model, tokenizer, torch.bfloat16), draw_prompts(16, 40, 250), []
    for prompt, completion in zip(prompts, sampler.generate(prompts, 32), strict=True):
        text = torch.tensor([prompt + completion], device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            logits = model(text).logits[0, len(prompt) - 1 : -1].float()  # [tokens, vocabulary]
        chosen = logits.gather(1, text[0, len(prompt) :, None])[:, 0]
        gaps.append(((logits.max(-1).values - chosen) / logits.std(-1)).mean().item())
    gap = statistics.fmean(gaps)
    assert gap < 0.05, f"the loop departs from a teacher-forced forward by {gap} standard deviations of the logits"
    if device.type == "cuda" and sampler.batch is not None:
        torch.cuda.set_sync_debug_mode("error")
        sampler.step(sampler.batch)
        torch.cuda.set_sync_debug_mode("default")
    print(f"in bf16 the chosen tokens lie {gap:.4f} standard deviations of the logits below the likeliest")


def main() -> None:
    device, _ = pick_device(cpu=False)
    check_tokens(device)
    check_precision(device)


if __name__ == "__main__":
    main()
