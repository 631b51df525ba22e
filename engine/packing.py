"""Packs: the completions of a group stand behind one copy of their prompt, so that the prompt is computed once.

A pack is one sequence: a prompt without its last token, then for each completion that last token and all tokens of the
completion but its last. So each of these positions has one label, the next token. A mask keeps completions from seeing
each other, and their positions continue those of the prompt. The method is Prefix Grouper's (arXiv 2506.05433).

With more completions in a pack fewer copies of the prompt are computed, but attention covers more pairs of tokens.
`plan` weighs the two costs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from engine.rollout import TRIED

# For as many multiplications attention takes so many times as long as linear layers do. Measured on a CPU with units
# for bf16, where it was 7 to 9; on CUDA it is a guess.
ATTENTION = 8.0
# The share of the pairs of tokens that causal attention computes, by blocks of 512; under a mask all are computed.
CAUSAL = 0.75


class Row(NamedTuple):
    """A prompt and completion in a row of TRL's batch."""

    index: int  # of the row
    prompt: int  # the same number for the same prompt
    prompt_length: int  # tokens
    length: int  # tokens of the completion that are scored


Pack = list[Row]  # rows of one prompt


def why_not(model: PreTrainedModel) -> str | None:
    """Why the completions of a group cannot share their prompt in this model; None if they can."""
    config = model.config
    if config.model_type not in TRIED:
        return f"not tried with a {config.model_type} model"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "a sliding window limits its attention"
    if config._attn_implementation != "sdpa":
        return f"{config._attn_implementation} attention takes no mask of pairs of tokens"
    return None


def pair_cost(model: PreTrainedModel) -> float:
    """The cost of a pair of tokens in attention, if that of a token in the linear layers is 1."""
    body = model.base_model
    weights = sum(weight.numel() for name, weight in body.named_parameters() if "embed" not in name)
    width = model.config.num_attention_heads * getattr(body.layers[0].self_attn, "head_dim", 0)
    # query x key and share x value, for each weight
    return ATTENTION * 2 * width * model.config.num_hidden_layers / weights


def read_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_columns: int) -> list[Row]:
    """The rows of a batch, [rows, columns], whose prompts are padded on the left and completions on the right."""
    used = attention_mask[:, :prompt_columns].bool()
    _, prompt = input_ids[:, :prompt_columns].masked_fill(~used, -1).unique(dim=0, return_inverse=True)
    figures = torch.stack([prompt, used.sum(1), attention_mask[:, prompt_columns:].sum(1)], dim=1)
    return [Row(index, *row) for index, row in enumerate(figures.tolist())]


def plan(rows: list[Row], pair_cost: float, shared: bool = True) -> tuple[list[Pack], float]:
    """The cheapest packs for a forward pass over these rows, and their cost in tokens.

    Only with `shared` a pack may hold several completions.
    """
    groups: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        groups.setdefault(row.prompt, []).append(row)
    best: tuple[list[Pack], float] | None = None
    size = 1  # completions in a pack
    while best is None or shared and size < 2 * max(map(len, groups.values())):
        packs = [pack for group in groups.values() for pack in divide(group, size)]
        width = max(map(width_of, packs))
        pairs = width * width * (CAUSAL if size == 1 else 1.0)
        cost = len(packs) * (width + pair_cost * pairs)
        if best is None or cost < best[1]:
            best = packs, cost
        size *= 2
    return best


def divide(group: list[Row], size: int) -> list[Pack]:
    """Divide the rows of a group, longest first, into packs of about `size` rows and about equal length."""
    packs: list[Pack] = [[] for _ in range(-(-len(group) // size))]
    for row in group:
        min(packs, key=lambda pack: sum(other.length for other in pack)).append(row)
    return packs


def width_of(pack: Pack) -> int:
    """The number of tokens of a pack."""
    return pack[0].prompt_length - 1 + sum(row.length for row in pack)


def arrange(rows: list[Row], micro_batch: int, pair_cost: float, shared: bool) -> list[Row]:
    """The order of the rows whose micro batches cost less: by length, or whole groups together.

    The longest come first, so that memory peaks at once.
    """

    def cost(order: list[Row]) -> float:
        chunks = (order[start : start + micro_batch] for start in range(0, len(order), micro_batch))
        return sum(plan(chunk, pair_cost, shared)[1] for chunk in chunks)

    totals: dict[int, int] = {}
    for row in rows:
        totals[row.prompt] = totals.get(row.prompt, row.prompt_length) + row.length
    by_length = sorted(rows, key=lambda row: row.prompt_length + row.length, reverse=True)
    by_group = sorted(by_length, key=lambda row: (totals[row.prompt], row.prompt), reverse=True)
    return min((by_length, by_group), key=cost) if shared else by_length


class Layout(NamedTuple):
    """The inputs of a forward pass over packs, and where in the batch its log-probabilities belong."""

    ids: torch.Tensor  # [packs, width]
    labels: torch.Tensor  # [packs, width]
    positions: torch.Tensor | None  # [packs, width]; None if no pack has a second completion
    mask: torch.Tensor | None  # [packs, 1, width, width]; None in the same case
    places: torch.Tensor  # [n] of the n scored tokens in the flattened output
    targets: torch.Tensor  # [2, n] their rows and completion columns in the batch


def lay_out(packs: list[Pack], input_ids: torch.Tensor, prompt_columns: int) -> Layout:
    """Lay out packs of the rows of the batch `input_ids`, [rows, columns].

    The indices are computed on the CPU and sent to the device in two pieces.
    """
    rows = [row for pack in packs for row in pack]
    width = max(max(map(width_of, packs)), 2)
    if input_ids.is_cuda:
        width = -(-width // 64) * 64  # fewer shapes: each new one costs the allocator and the attention kernels time
    columns = input_ids.shape[1]
    heads = torch.tensor([pack[0].prompt_length - 1 for pack in packs])  # [packs] tokens of the prompt in a pack
    lengths = torch.tensor([row.length for row in rows])  # [rows]
    pack = torch.tensor([number for number, pack in enumerate(packs) for _ in pack])  # [rows] the pack of each row
    within = torch.cat([torch.arange(len(each)) for each in packs])  # [rows] the number of each row in its pack
    before = lengths.cumsum(0) - lengths  # [rows] scored tokens of all earlier rows
    begin = heads[pack] + before - before[within == 0][pack]  # [rows] where each row begins in its pack

    def each_token(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For all tokens of sequences of these lengths: the number of the sequence, and the place in it."""
        sequence = torch.arange(len(counts)).repeat_interleave(counts)
        return sequence, torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]

    source, position = torch.zeros(len(packs), width, dtype=torch.long), torch.arange(width).repeat(len(packs), 1)
    segment = torch.full_like(source, -1)  # -1: padding; 0: the prompt; from 1 on: the completions of a pack
    first = torch.tensor([pack[0].index for pack in packs])
    number, place = each_token(heads)
    source[number, place] = first[number] * columns + prompt_columns - heads[number] - 1 + place
    segment[number, place] = 0
    row, place = each_token(lengths)
    index = torch.tensor([row.index for row in rows])[row]
    target = pack[row], begin[row] + place
    source[target] = index * columns + prompt_columns - 1 + place  # the last token of the prompt, then the completion
    position[target] = heads[pack[row]] + place
    segment[target] = within[row] + 1

    source, position, segment = torch.stack([source, position, segment]).to(input_ids.device)
    places, *targets = torch.stack([target[0] * width + target[1], index, place]).to(input_ids.device)
    flat = input_ids.flatten()
    labels = flat[(source + 1).clamp(max=len(flat) - 1)].masked_fill(segment < 1, -100)
    if len(rows) == len(packs):
        return Layout(flat[source], labels, None, None, places, torch.stack(targets))
    seen = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])  # [packs, query, key]
    mask = seen & torch.ones(width, width, dtype=torch.bool, device=input_ids.device).tril()
    return Layout(flat[source], labels, position, mask[:, None], places, torch.stack(targets))
