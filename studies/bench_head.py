"""TRL's LM head on a CPU: what does the width of its tiles cost?

    python studies/bench_head.py [--tokens 2000] [--rounds 3]

The head turns hidden states into log-probabilities and entropies in tiles of the vocabulary, so that all logits never
exist at once. Where there is no Triton each tile goes through a dozen torch operations, and one of 32,768 columns, as
TRL makes them, is hundreds of MB that pass through memory every time; trainer.py makes them CPU_TILE wide. Random
numbers at Qwen2.5-0.5B's shape, bf16 autocast; the widths take turns in one process, forward and backward, with and
without the head's own gradient (beside an adapter it is frozen).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trl.trainer.utils
from qwen import SHAPE
from trl.kernels import ChunkedLogProbFunction

from engine.trainer import CPU_TILE

WIDTHS = [trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, 8192, 4096, CPU_TILE, 1024]


def run(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, width: int) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ("log_probs", "entropy")
        made = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, width, None, 1.0, outputs)
    made[0].mean().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL's LM head on a CPU", allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=2000, help="of a micro batch, completions only")
    parser.add_argument("--rounds", type=int, default=3, help="how often the widths take turns")
    flags = parser.parse_args()
    torch.manual_seed(0)
    size, vocabulary = SHAPE["hidden_size"], SHAPE["vocab_size"]
    hidden = torch.randn(flags.tokens, size, requires_grad=True)
    weight, targets = torch.randn(vocabulary, size) * 0.05, torch.randint(vocabulary, (flags.tokens,))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {flags.tokens} tokens\n")
    print("| columns of a tile | head frozen: s | ratio | head trained: s | ratio |\n|---:|---:|---:|---:|---:|")
    seconds: dict[tuple[int, bool], list[float]] = {}
    for _ in range(flags.rounds):
        for trained in (False, True):
            for width in WIDTHS:
                taken = run(hidden, weight.detach().requires_grad_(trained), targets, width)
                seconds.setdefault((width, trained), []).append(taken)
    for width in WIDTHS:
        cells = [str(width)]
        for trained in (False, True):
            taken, stock = seconds[width, trained], seconds[WIDTHS[0], trained]
            ratios = [a / b for a, b in zip(stock, taken, strict=True)]
            cells.append(f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})")
            cells.append(f"{statistics.median(ratios):.2f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
