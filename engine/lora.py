"""The adapter: its configuration, the frozen weights below it in low precision, and in full again for the merge."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from engine.console import UserError
from engine.fingerprints import fingerprint_weights
from engine.models import load_model


def lora_config(recipe: SimpleNamespace, model: PreTrainedModel) -> LoraConfig | None:
    """The LoRA constants under PEFT's names; None where all weights are trained.

    Raises:
        UserError: LORA_MODULES names a module that `model` does not have below its head.
    """
    if not recipe.USE_LORA:
        return None
    head = model.get_output_embeddings()  # TRL uses the weight of the head by itself, without an adapter
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    there = sorted({name.split(".")[-1] for name, module in linear.items() if module is not head})
    for name in recipe.LORA_MODULES:
        if name not in there:
            has = ", ".join(there)
            raise UserError(f"LORA_MODULES: this model has no {name!r} below its head (it has: {has}); mend the list")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.LORA_RANK,
        lora_alpha=recipe.LORA_ALPHA,
        lora_dropout=recipe.LORA_DROPOUT,
        target_modules=recipe.LORA_MODULES,
    )


def frozen_linear_layers(model: PeftModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers that are not trained, but for the head, by the names that they have without the adapter."""
    base = model.get_base_model()
    for name, module in base.named_modules():
        frozen = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        if frozen and module is not base.get_output_embeddings():
            yield name.removesuffix(".base_layer"), module


def lower_frozen(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> None:
    """Hold the frozen linear weights in the precision that autocast computes in. Nothing happens without an adapter.

    Autocast would cast them anew in every forward pass, twice with gradient checkpointing, and rounds as this does.
    """
    if isinstance(model, PeftModel):
        for _, layer in frozen_linear_layers(model):
            for parameter in layer.parameters():
                parameter.data = parameter.data.to(dtype)


def restore_frozen(model: PreTrainedModel | PeftModel, source: str, fingerprint: str | None) -> None:
    """Put the float32 weights of `source` back where `lower_frozen` rounded them, so that a merge starts from them.

    Args:
        source: the hub id or folder that the model was loaded from.
        fingerprint: of its weights at that time, as `fingerprint_weights` gives it.

    Raises:
        UserError: there are other weights in `source` now; the checkpoints still hold the adapter.
    """
    lowered = dict(frozen_linear_layers(model)) if isinstance(model, PeftModel) else {}
    lowered = {name: layer for name, layer in lowered.items() if layer.weight.dtype != torch.float32}
    if not lowered:
        return
    if fingerprint_weights(source) != fingerprint:
        raise UserError(f"MODEL {source!r} has other weights than when the run began; put them back and --resume")
    full = load_model(source)[0]
    for name, layer in lowered.items():
        for key, parameter in full.get_submodule(name).named_parameters():
            getattr(layer, key).data = parameter.data.to(layer.weight.device)
