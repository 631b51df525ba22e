"""The mean of the weights of several trainings that began from one model, such as the same GRPO under several seeds.

    python -m engine.average output/grpo-7 output/grpo-8 --output output/mean

The mean is one model, no slower than each of them ("model soups", arXiv 2203.05482; of models trained by RL: WARP,
arXiv 2406.16768). docs/results.md says what it did to a real model. What lies beside the first model's weights, such as
its prompt, recipe and Modelfile, belongs to the mean too.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.console import UserError, refuse_missing_folder, run
from engine.models import load_model


def mean_model(names: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with the mean of the float32 weights of `names`, and the first one's tokenizer.

    Raises:
        UserError: one cannot be loaded, or its weights differ from the first one's in name or shape.
    """
    mean, tokenizer = load_model(names[0])
    weights = dict(mean.named_parameters())  # a tied weight once
    shapes = {key: weight.shape for key, weight in weights.items()}
    for count, name in enumerate(names[1:], 2):
        others = dict(load_model(name)[0].named_parameters())
        wrong = shapes.items() ^ {key: weight.shape for key, weight in others.items()}.items()
        if wrong:
            raise UserError(f"{name!r} is another architecture than {names[0]!r} (such as {min(wrong)[0]})")
        with torch.no_grad():
            for key, weight in weights.items():
                weight.lerp_(others[key], 1 / count)  # the mean of `count` from the mean of one less
    return mean, tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the mean of the weights of several trained models")
    parser.add_argument("models", nargs="+", help="two or more: saved models, checkpoints or adapters")
    parser.add_argument("--output", required=True, help="a new folder")
    flags = parser.parse_args(argv)
    output = Path(flags.output)
    if len(flags.models) < 2:
        raise UserError(f"{flags.models[0]!r} alone has no mean; name two models or more")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {flags.output!r} is in use; name a new folder")
    for name in flags.models:
        refuse_missing_folder(name, "the model")
    unfinished = output.with_name(f".tmp-{output.name}")  # renamed in the end: a kill leaves no half of a model
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for part in mean_model(flags.models):
        part.save_pretrained(unfinished)
    for name in ("recipe", "Modelfile"):
        first = Path(flags.models[0], name)
        if first.is_dir():
            shutil.copytree(first, unfinished / name)
        elif first.is_file():
            shutil.copy(first, unfinished)
    if output.exists():
        output.rmdir()
    os.replace(unfinished, output)
    print(f"written    {output}: the mean of {len(flags.models)} models")


if __name__ == "__main__":
    run(main)
