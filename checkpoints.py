"""What must not get lost: results, checkpoints, the recipe of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from prompts import UserError

# What a run leaves behind that nobody wants overwritten. `base/` (the demo's cache) does not count.
TRAINED = ["checkpoint-*", "*.safetensors", "adapter", "results.json", "recipe"]


def check_free(output: Path) -> None:
    """Raises UserError where `output` holds something that was trained, or is no folder."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {str(output)!r} is a file; name a folder")
    for pattern in TRAINED:
        for found in sorted(output.glob(pattern)):
            raise UserError(
                f"{str(output)!r} already holds a run ({found.name}), which is never overwritten; "
                "continue it with --resume, or name another folder with --output"
            )


def check_disk(output: Path, model, save_limit: int) -> None:
    """Raises UserError where `output`'s disk has no room for the checkpoints of one run.

    A checkpoint holds float32 weights and, for the trainable ones, two Adam moments; one more than `save_limit`
    exists while the oldest is being replaced, and the model saved at the end comes on top.
    """
    weights = 4 * sum(p.numel() for p in model.parameters())
    trainable = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = trainable if trainable < weights else weights  # an adapter's checkpoint holds the adapter only
    needed = (save_limit + 1) * (saved + 2 * trainable) + weights
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{str(output)!r} has {free / 1e9:.1f} GB free and this run needs {needed / 1e9:.1f} GB for "
            f"{save_limit + 1} checkpoints and the model; free some, lower SAVE_LIMIT, or name another --output"
        )


def newest_checkpoint(output: Path) -> Path:
    """The checkpoint with the highest step. Raises UserError where there is none."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if not found:
        raise UserError(f"--resume: {str(output)!r} holds no checkpoint; start without --resume")
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def write_json(path: Path, content: dict) -> None:
    """Write all of it or nothing: readers never meet half a file."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def save_recipe(output: Path, recipe: SimpleNamespace) -> None:
    """Keep in `output/recipe/` what made this run: every constant, the versions, the scripts themselves."""
    folder = output / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "datasets", "peft")}
    write_json(folder / "recipe.json", vars(recipe) | {"versions": versions})
    for script in Path(__file__).parent.glob("*.py"):
        shutil.copy(script, folder)


def read_results(output: Path) -> dict:
    """results.json of an earlier start of this run, or nothing."""
    file = output / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def save_merged(model, tokenizer, output: Path) -> None:
    """Save the plain model that base and adapter make together; `model` is that model afterwards."""
    merged = model.merge_and_unload()
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
