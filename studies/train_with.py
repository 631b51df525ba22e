"""train_grpo.py with other constants than stand in it, for the studies and by hand.

python studies/train_with.py FAST_ROLLOUT=False BETA=0.04 --demo    # first constants, then train_grpo.py's own flags
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_grpo
from engine.console import UserError, run


def read_constants(words: list[str]) -> dict[str, Any]:
    """`["BETA=0.04"]` -> `{"BETA": 0.04}`. Raises UserError for what is no Python value."""
    constants = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            constants[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{word!r} is not NAME=VALUE with a Python value; a text needs quotes") from error
    return constants


def main() -> None:
    words = [word for word in sys.argv[1:] if re.match("[A-Z_]+=", word)]
    train_grpo.main([word for word in sys.argv[1:] if word not in words], **read_constants(words))


if __name__ == "__main__":
    run(main)
