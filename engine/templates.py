"""A chat template that carries the prompt: the turns that stand before every question without a system turn.

Whoever asks a saved model (`pipeline`, Ollama, chat.py, evaluate.py, a later training) asks it as it was trained, since
the prompt is part of the model's folder.
"""

import json
from pathlib import Path

# A carrying template is _BEFORE, the turns as JSON, _AFTER, and then the model's own template.
_BEFORE = "{%- if not messages or messages[0]['role'] != 'system' %}{%- set messages = "
_AFTER = " + messages %}{%- endif %}{#- the model's own template #}"


def prompt_turns(system: str, example: list[dict]) -> list[dict]:
    """The turns before a question."""
    return [{"role": "system", "content": system}, *example]


def carry_prompt(template: str, turns: list[dict]) -> str:
    """The template, with `turns` in the place of those that it carried before, if any."""
    return _BEFORE + json.dumps(turns, ensure_ascii=False) + _AFTER + own_template(template)


def own_template(template: str) -> str:
    """The template without the turns that it carries."""
    return template.partition(_AFTER)[2] if template.startswith(_BEFORE) else template


def carried_prompt(template: str) -> list[dict] | None:
    """The turns that a template carries; None where it carries none."""
    return json.loads(template.partition(_AFTER)[0].removeprefix(_BEFORE)) if template.startswith(_BEFORE) else None


def prompt_of(model: str, untrained: list[dict]) -> list[dict]:
    """The turns under which a model is asked.

    Args:
        model: a hub id, or the folder of a model, a checkpoint or an adapter.
        untrained: what a model gets that was not trained here.
    """
    from engine.models import find_beside

    file = Path(model, "chat_template.jinja")
    if file.is_file() and (carried := carried_prompt(file.read_text(encoding="utf-8"))) is not None:
        return carried
    trained = find_beside(model, "recipe/recipe.json")  # of a folder from before templates carried the prompt
    return prompt_turns(trained["SYSTEM_PROMPT"], trained["EXAMPLE"]) if "SYSTEM_PROMPT" in trained else untrained
