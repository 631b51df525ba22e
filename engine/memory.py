"""How many rows fit into a GPU: MICRO_BATCH = 0 and EVAL_BATCH = 0 are chosen here, by arithmetic alone.

docs/speed.md tells the formula. Nothing is loaded or tried: the figures come from the model's configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

from engine.console import UserError, note
from engine.templates import trained_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

RESERVE = 0.2  # of the free memory stays free: for CUDA's own needs, captured graphs and what arithmetic overlooks
ON_CPU = {"MICRO_BATCH": 4, "EVAL_BATCH": 128}  # more rows make a CPU no faster, and other programs need its memory
MOST = {"MICRO_BATCH": 64, "EVAL_BATCH": 256}  # more rows are hardly faster


class Shape(NamedTuple):
    """What the arithmetic needs to know of a model: numbers of weights, and widths."""

    weights: int
    linear: int  # weights of the linear layers below the head
    adapter: int  # weights of the adapter that the LoRA constants describe
    hidden: int
    intermediate: int
    layers: int
    kv: int  # width of the keys, and of the values, of one token in one layer


def shape_of(config: PretrainedConfig, recipe: SimpleNamespace) -> Shape:
    """The shape of a model that has this configuration. No weight is made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    adapted = [m for name, m in layers.items() if name.rpartition(".")[2] in recipe.LORA_MODULES]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        weights=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in layers.values()),
        adapter=sum(recipe.LORA_RANK * (module.in_features + module.out_features) for module in adapted),
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", 4 * config.hidden_size),
        layers=config.num_hidden_layers,
        kv=heads * size,
    )


def state_bytes(shape: Shape, recipe: SimpleNamespace, autocast: bool) -> int:
    """What lies in memory all the time from the second step on: weights, Adam's moments, and the sampler's copies."""
    low, other = 2 if autocast else 0, shape.weights - shape.linear
    if recipe.USE_LORA:  # frozen linear layers are held in autocast's precision, and the sampler shares them
        return (low or 4) * shape.linear + (4 + low) * other + 12 * shape.adapter
    reference = 4 * shape.weights * (getattr(recipe, "BETA", 0.0) > 0)
    return (12 + low) * shape.weights + reference


def row_bytes(shape: Shape, recipe: SimpleNamespace, autocast: bool, tokens: int) -> int:
    """What a row of so many tokens takes while its gradients are computed."""
    wide = 1 if autocast else 2
    layer = wide * (8 * shape.intermediate + 34 * shape.hidden)  # bytes a token that one layer keeps for its backward
    if recipe.GRADIENT_CHECKPOINTING:  # the input of each layer, and one layer computed again, with its gradients
        return tokens * (4 * shape.hidden * shape.layers + layer * 4 // 3)
    return tokens * layer * shape.layers


def cache_bytes(shape: Shape, autocast: bool, tokens: int) -> int:
    """Keys and values of a row of so many tokens."""
    return tokens * shape.layers * shape.kv * 2 * (2 if autocast else 4)


def choose_micro_batch(free: int, shape: Shape, recipe: SimpleNamespace, autocast: bool, tokens: int, rows: int) -> int:
    """The rows of a forward pass in training: as many as fit, and a divisor of `rows`.

    Args:
        free: bytes, before anything is loaded.
        tokens: of a row at most.
        rows: of an optimizer step in this process, which are also drawn at a time.

    Raises:
        UserError: not one row fits; the message says what would help.
    """
    gradients = 4 * shape.adapter if recipe.USE_LORA else 4 * (2 * shape.weights - shape.linear)  # embedding's twice
    drawn = rows * cache_bytes(shape, autocast, tokens)  # the sampler keeps its cache from step to step
    room = free * (1 - RESERVE) - state_bytes(shape, recipe, autocast) - gradients - drawn
    fitting = int(room // row_bytes(shape, recipe, autocast, tokens))
    if fitting < 1:
        remedy = "set USE_LORA = True"
        if recipe.USE_LORA:
            remedy = "set GRADIENT_CHECKPOINTING = True, lower the numbers of tokens, or train a smaller model"
        raise UserError(
            f"{free / 1e9:.1f} GB of free GPU memory are too few to train {recipe.MODEL!r} with these constants, "
            f"by arithmetic; {remedy}. With a MICRO_BATCH of 1 or more it is tried"
        )
    return max(count for count in range(1, min(fitting, MOST["MICRO_BATCH"], rows) + 1) if rows % count == 0)


def choose_eval_batch(free: int, held: int, shape: Shape, autocast: bool, tokens: int) -> int:
    """The questions that are answered at a time: a power of two.

    Args:
        free: bytes.
        held: bytes of these that other things than keys and values will take.
        tokens: of a question and its answer at most.
    """
    fitting = int((free * (1 - RESERVE) - held) // cache_bytes(shape, autocast, tokens))
    return 2 ** (max(min(fitting, MOST["EVAL_BATCH"]), 1).bit_length() - 1)


def fit_answers(model: PreTrainedModel, autocast: bool, tokens: int) -> int:
    """The same for a model that is on its device already, where nothing trains."""
    import torch

    if model.device.type == "cpu":
        return ON_CPU["EVAL_BATCH"]
    shape = shape_of(model.config, SimpleNamespace(LORA_MODULES=[], LORA_RANK=1))
    free, _ = torch.cuda.mem_get_info(model.device)
    return choose_eval_batch(free, 2 * shape.weights * autocast, shape, autocast, tokens)


def fit_batches(
    recipe: SimpleNamespace, device: torch.device, autocast: bool, tokens: int, rows: int, resume: bool
) -> None:
    """Put numbers in the place of MICRO_BATCH = 0 and EVAL_BATCH = 0. A given number is taken as it is.

    Args:
        tokens: of a row at most.
        rows: of an optimizer step in this process.
        resume: take what the run began with, so that it goes on bit by bit.

    Raises:
        UserError: as in `choose_micro_batch`.
    """
    import torch
    from transformers import AutoConfig

    names = [name for name in ON_CPU if getattr(recipe, name) == 0]
    if not names:
        return
    begun = trained_recipe(recipe.OUTPUT_DIR) if resume else {}
    if all(begun.get(name) for name in names):
        chosen = {name: begun[name] for name in names}
    elif device.type == "cpu":
        fitting = max(count for count in range(1, ON_CPU["MICRO_BATCH"] + 1) if rows % count == 0)
        chosen = ON_CPU | {"MICRO_BATCH": fitting}
    else:
        free, _ = torch.cuda.mem_get_info(device)
        adapter = Path(recipe.MODEL, "adapter_config.json")
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else recipe.MODEL
        shape = shape_of(AutoConfig.from_pretrained(base), recipe)
        held = state_bytes(shape, recipe, autocast)
        chosen = {"EVAL_BATCH": choose_eval_batch(free, held, shape, autocast, tokens)}
        if "MICRO_BATCH" in names:
            chosen["MICRO_BATCH"] = choose_micro_batch(free, shape, recipe, autocast, tokens, rows)
        note(f"{free / 1e9:.1f} GB of GPU memory are free, of which a fifth is held in reserve")
    vars(recipe).update({name: chosen[name] for name in names})
