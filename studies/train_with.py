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
from engine import demo
from engine.console import UserError, run


def train(argv: list[str], **constants: Any) -> None:
    """`train_grpo.main(argv)`, in this process, with `constants` in the place of the file's and of the demo's.

    This is the one place where a study sets them.

    Raises:
        UserError: a name that is no constant, and what train_grpo.py raises.
    """
    before, demo_before = {}, dict(demo.RECIPE)
    for name in constants:
        if not hasattr(train_grpo, name):
            raise UserError(f"{name} is no constant of train_grpo.py; mend the name")
        before[name] = getattr(train_grpo, name)
    try:
        vars(train_grpo).update(constants)
        demo.RECIPE |= {name: value for name, value in constants.items() if name in demo.RECIPE}
        train_grpo.main(argv)
    finally:
        vars(train_grpo).update(before)
        demo.RECIPE.clear()
        demo.RECIPE |= demo_before


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
    train([word for word in sys.argv[1:] if word not in words], **read_constants(words))


if __name__ == "__main__":
    run(main)
