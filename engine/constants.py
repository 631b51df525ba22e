"""Reads the constants at the top of a script, changes them for one run, and checks them."""

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engine.console import UserError

# Constants that a flag can change for one run
FLAGS = {"MODEL": "--model", "DATASET": "--dataset", "OUTPUT_DIR": "--output", "SEED": "--seed"}
FLAGS["MAX_STEPS"] = "--max-steps"
# The ranges of constants, in words and as a test. All other numbers must be above 0, and all other texts not empty.
RANGES = {
    "SEED": ("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
    "COMPLETIONS_PER_QUESTION": ("2 or more: one is its own baseline", lambda value: value >= 2),
    "WARMUP_STEPS": ("0 or more", lambda value: value >= 0),
    "ADAM_BETAS": ("two from 0, below 1", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value)),
    "WEIGHT_DECAY": ("0 or more", lambda value: value >= 0),
    "MAX_GRAD_NORM": ("0 or more", lambda value: value >= 0),
    "MAX_STEPS": ("-1, or 1 or more", lambda value: value == -1 or value >= 1),
    "MICRO_BATCH": ("0 or more", lambda value: value >= 0),
    "EVAL_BATCH": ("0 or more", lambda value: value >= 0),
    "TEST_QUESTIONS": ("-1, or 1 or more", lambda value: value == -1 or value >= 1),
    "BETA": ("0 or more", lambda value: value >= 0),
    "LORA_DROPOUT": ("from 0, below 1", lambda value: 0 <= value < 1),
    "LORA_MODULES": ("one name or more", lambda value: value != []),
    "REWARD_MODEL": ("a text", lambda value: True),  # "" means that there is none
    "MIX_SHARE": ("from 0, below 1", lambda value: 0 <= value < 1),
    "FINAL_RATE": ("from 0 to 1", lambda value: 0 <= value <= 1),
}
WORDS = {str: "a text", bool: "True or False", int: "a whole number", float: "a number"}  # type -> in words
WORDS |= {list[str]: "a list of texts", tuple[float, float]: "two numbers"}


def constants_of(script: ModuleType) -> dict[str, Any]:
    """The constants of a script by name: the names in capitals at its top that have a type.

    Raises UserError for one without a type, which somebody has lost in editing: it would have no effect.
    """
    types = get_type_hints(script)
    for name, value in vars(script).items():
        plain = name.isupper() and type(value) in (bool, int, float, str)
        if plain and name not in types and name != "TYPE_CHECKING":
            raise UserError(
                f"{name} = {value!r} in {Path(script.__file__).name} has no type and is not read; write `{name}: "
                f"{type(value).__name__} = {value!r}`"
            )
    return {name: getattr(script, name) for name in types if name.isupper()}


def make_recipe(
    constants: dict[str, Any], demo: dict[str, Any], given: dict[str, Any], flags: dict[str, Any]
) -> SimpleNamespace:
    """The constants of one run: the script's, those of the demo, those `given` to `main`, the flags. The last one wins.

    A flag that was not given is None. Raises UserError if `given` names a constant that does not exist.
    """
    for name in given:
        if name not in constants:
            raise UserError(f"there is no constant {name!r} to set; there are {', '.join(sorted(constants))}")
    flags = {name: value for name, value in flags.items() if value is not None}
    return SimpleNamespace(**constants | demo | given | flags)


def check_constants(constants: dict[str, Any], *scripts: ModuleType) -> None:
    """Check the type and the range of every constant that one of these scripts defines; later scripts win.

    Raises UserError for the first constant that has a wrong type or is out of range, with the file to edit.
    """
    defined = {}
    for script in scripts:
        file = Path(script.__file__).name
        defined |= {name: (kind, file) for name, kind in get_type_hints(script).items() if name in constants}
    for name, (kind, file) in defined.items():
        value = constants[name]
        if not is_a(value, kind):
            allowed = WORDS.get(kind) or f"one of {', '.join(map(repr, get_args(kind)))}"
            raise UserError(f"{name} = {value!r} is not {allowed}; mend it in {file}")
        if kind is bool:
            continue
        default = ("above 0", lambda value: value > 0) if type(value) in (int, float) else ("a text", bool)
        words, holds = RANGES.get(name, default)
        if not holds(value):
            flag = f", or by {FLAGS[name]}" if name in FLAGS else ""
            raise UserError(f"{name} = {value!r} is not {words}; mend it in {file}{flag}")


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value fits an annotation. True and NaN do not count as numbers; a list must not hold empty texts."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (list, tuple):
        return isinstance(value, list | tuple) and all(is_a(each, get_args(kind)[0]) and each != "" for each in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind
