"""LoRA: the adapter's configuration, and the precision of the frozen weights below it."""

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
    """The LoRA constants under PEFT's names; None if all weights are trained.

    Raises UserError if LORA_MODULES names a module that `model` does not have below its head.
    """
    if not recipe.USE_LORA:
        return None
    head = model.get_output_embeddings()  # excluded, because TRL would use its weight without the adapter
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    names = sorted({name.split(".")[-1] for name, module in linear if module is not head})
    for name in recipe.LORA_MODULES:
        if name not in names:
            has = ", ".join(names)
            raise UserError(f"LORA_MODULES: this model has no {name!r} below its head (it has: {has}); mend the list")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.LORA_RANK,
        lora_alpha=recipe.LORA_ALPHA,
        lora_dropout=recipe.LORA_DROPOUT,
        target_modules=recipe.LORA_MODULES,
    )


def frozen_linear_layers(model: PeftModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The frozen linear layers, without the head, and their names in the model without an adapter."""
    base = model.get_base_model()
    for name, module in base.named_modules():
        frozen = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        if frozen and module is not base.get_output_embeddings():
            yield name.removesuffix(".base_layer"), module


def lower_frozen(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> None:
    """Cast the frozen linear weights below an adapter to the dtype of autocast. Other models are left alone.

    The results are the same, but autocast would cast the weights in every forward pass.
    """
    if isinstance(model, PeftModel):
        for _, layer in frozen_linear_layers(model):
            for parameter in layer.parameters():
                parameter.data = parameter.data.to(dtype)


def restore_frozen(model: PreTrainedModel | PeftModel, source: str, fingerprint: str | None) -> None:
    """Undo `lower_frozen` before the adapter is merged, with the float32 weights of the hub id or folder `source`.

    Raises UserError if these do not have the `fingerprint` of the run's start. The checkpoints still hold the adapter.
    """
    layers = frozen_linear_layers(model) if isinstance(model, PeftModel) else []
    lowered = {name: layer for name, layer in layers if layer.weight.dtype != torch.float32}
    if not lowered:
        return
    if fingerprint_weights(source) != fingerprint:
        raise UserError(f"MODEL {source!r} has other weights than when the run began; put them back and --resume")
    full = load_model(source)[0]
    for name, layer in lowered.items():
        for key, parameter in full.get_submodule(name).named_parameters():
            getattr(layer, key).data = parameter.data.to(layer.weight.device)
