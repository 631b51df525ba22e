"""Packs: the completions of a group stand behind one copy of their prompt, so that the prompt is read once.

A pack is one sequence: a prompt without its last token, and then for each of its completions that last token and all
tokens but the end. So every position of a completion has one label, the next token. A mask keeps completions from
seeing each other, and their positions count on from the prompt. The method is Prefix Grouper's (arXiv 2506.05433).

More completions in a pack save more copies of the prompt, but attention then looks at more pairs of tokens. How many go
together is decided by the cost of both.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from engine.rollout import TRIED

# Attention takes so many times as long as linear layers do for as many multiplications. Measured on a CPU with units for
# bf16, where it was 7 to 9; on CUDA it is a guess.
ATTENTION = 8.0
# With a mask all pairs of tokens are computed. Without one, causal attention leaves out what it can: by blocks of 512.
CAUSAL = 0.75


class Row(NamedTuple):
    """A completion behind its prompt, as a row of TRL's batch: its place there and what it costs."""

    index: int  # in the batch
    prompt: int  # rows with the same number have the same prompt
    prompt_length: int  # tokens
    length: int  # tokens of the completion that are scored


Pack = list[Row]  # rows of one prompt


def why_not(model: PreTrainedModel) -> str | None:
    """Why the completions of a group cannot share their prompt in this model; None where they can."""
    config = model.config
    if config.model_type not in TRIED:
        return f"not tried with a {config.model_type} model"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "a sliding window limits its attention"
    if config._attn_implementation != "sdpa":
        return f"{config._attn_implementation} attention takes no mask of pairs of tokens"
    if getattr(config, "output_router_logits", False):
        return "its routers have a loss of their own"
    if not {"position_ids", "attention_mask"} <= inspect.signature(type(model).forward).parameters.keys():
        return "its forward takes no positions or no mask"
    return None


def pair_cost(model: PreTrainedModel) -> float:
    """What a pair of tokens costs in attention, where a token costs 1 in the linear layers."""
    body = model.base_model
    weights = sum(weight.numel() for name, weight in body.named_parameters() if "embed" not in name)
    width = model.config.num_attention_heads * getattr(body.layers[0].self_attn, "head_dim", 0)
    # query x key and share x value, for each weight
    return ATTENTION * 2 * width * model.config.num_hidden_layers / weights


def read_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_columns: int) -> list[Row]:
    """The rows of a batch, [rows, columns], whose prompts are padded on the left and completions on the right.

    A device is waited for once.
    """
    used = attention_mask[:, :prompt_columns].bool()
    _, prompt = input_ids[:, :prompt_columns].masked_fill(~used, -1).unique(dim=0, return_inverse=True)
    figures = torch.stack([prompt, used.sum(1), attention_mask[:, prompt_columns:].sum(1)], dim=1)
    return [Row(index, *row) for index, row in enumerate(figures.tolist())]


def plan(rows: list[Row], pair_cost: float, shared: bool = True) -> tuple[list[Pack], float]:
    """The packs for a forward pass over these rows for which the least is computed, and their cost in tokens.

    Args:
        shared: whether several completions may stand in a pack.
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
    """The rows of a group, the longest first, in packs of about `size` rows and about the same length."""
    packs: list[Pack] = [[] for _ in range(-(-len(group) // size))]
    for row in group:
        min(packs, key=lambda pack: sum(other.length for other in pack)).append(row)
    return packs


def width_of(pack: Pack) -> int:
    """The tokens of a pack."""
    return pack[0].prompt_length - 1 + sum(row.length for row in pack)


def arrange(rows: list[Row], micro_batch: int, pair_cost: float, shared: bool) -> list[Row]:
    """The order of rows in which their micro batches compute the least: by their length, or whole groups together.

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
    """What a forward pass over some packs is fed, and where in the batch its log-probabilities belong.

    `ids` and `labels` are [packs, width]. `positions` [packs, width] and `mask` [packs, 1, width, width] are None where
    no pack has a second completion: causal attention needs neither. The n scored tokens stand in the flattened output
    at `places` [n], and in the batch in the row and completion column `targets` [2, n].
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | None
    places: torch.Tensor
    targets: torch.Tensor


def lay_out(packs: list[Pack], input_ids: torch.Tensor, prompt_columns: int) -> Layout:
    """Lay the packs out, from the rows of the batch `input_ids` [rows, columns].

    The indices are made on the CPU and travel to the device in two pieces.
    """
    rows = [row for pack in packs for row in pack]
    width = max(max(map(width_of, packs)), 2)
    if input_ids.is_cuda:
        width = -(-width // 64) * 64  # few shapes: allocator and attention kernels prepare for each new one
    columns = input_ids.shape[1]
    heads = torch.tensor([pack[0].prompt_length - 1 for pack in packs])  # [packs] tokens of the prompt in a pack
    lengths = torch.tensor([row.length for row in rows])  # [rows]
    pack = torch.tensor([number for number, pack in enumerate(packs) for _ in pack])  # [rows] the pack of each row
    within = torch.cat([torch.arange(len(each)) for each in packs])  # [rows] its place among the rows of the pack
    before = lengths.cumsum(0) - lengths  # [rows] scored tokens of all rows before it
    begin = heads[pack] + before - before[within == 0][pack]  # [rows] where it begins in its pack

    def each_token(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For sequences of these lengths, all tokens: the sequence, and the place in it."""
        sequence = torch.arange(len(counts)).repeat_interleave(counts)
        return sequence, torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]

    source, position = torch.zeros(len(packs), width, dtype=torch.long), torch.arange(width).repeat(len(packs), 1)
    segment = torch.full_like(source, -1)  # -1 padding, 0 the prompt, 1 and more the completions of a pack
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
