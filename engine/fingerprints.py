"""Fingerprints of the inputs of a run. A file or folder may change and keep its name; its fingerprint changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from engine.console import UserError, first_line


def fingerprint_rows(rows: Sequence) -> str:
    """The number of rows and a hash of them, in their order. Rows are anything that JSON can hold."""
    return f"{len(rows)} rows, sha256 {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"


def fingerprint_weights(model: str) -> str | None:
    """A hash of the weights in a folder; for an adapter also of the model that it was trained on.

    Every byte is read, at about a gigabyte a second, because a training may change few tensors. Returns None for a hub
    id or a folder without weights. Raises UserError if a file cannot be read.
    """
    files = sorted(Path(model).glob("*.safetensors")) if model else []
    config, digest = Path(model, "adapter_config.json"), hashlib.sha256()
    try:
        for file in files:
            with open(file, "rb") as weights:
                digest.update(hashlib.file_digest(weights, "sha256").digest())
        if files and config.is_file():
            base = json.loads(config.read_bytes())["base_model_name_or_path"]
            digest.update((fingerprint_weights(base) or base).encode())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the model {model!r} cannot be read: {first_line(error)}; mend it, or name another") from error
    return f"{len(files)} files, sha256 {digest.hexdigest()[:16]}" if files else None
