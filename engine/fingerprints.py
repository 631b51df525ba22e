"""What a run is fed, told by its content: a file or a folder may change and keep its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from engine.console import UserError, first_line


def fingerprint_rows(rows: Sequence) -> str:
    """The number of rows, of anything that JSON can hold, and a hash of them in their order."""
    return f"{len(rows)} rows, sha256 {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"


def fingerprint_weights(model: str) -> str | None:
    """A hash of a folder's weights, of an adapter also of those that it was trained on. Names and times do not count.

    Every byte is read, a second for a gigabyte: a sample could miss a training that changes few tensors, and loading
    the model then finds the bytes in memory.

    Returns:
        None where no folder holds weights: a hub id stands for itself, its commit changes with every edited page.

    Raises:
        UserError: a file that cannot be read.
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
