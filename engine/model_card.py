"""How others use the saved folder: the model card that people and the hub read, and the Modelfile that Ollama reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from engine.templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ollama's templates are Go's. Each question stands alone, as in training and in chat.py: only the last one is sent.
LAST_QUESTION = (
    '{{ $question := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $question = .Content }}{{ end }}{{ end }}'
)


def modelfile(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """What `ollama create` reads: the saved model, the prompt that it was trained under, greedy decoding, the end.

    The template is said because Ollama finds none in what transformers 5 saves, the penalty because its older versions
    punish repetition unasked, also at temperature 0.
    """
    question = [{"role": "user", "content": "{{ $question }}"}]
    return f'''\
# ollama create r1-zh -f Modelfile && ollama run r1-zh
FROM .
TEMPLATE """{LAST_QUESTION}{render(tokenizer, question)}"""
PARAMETER temperature 0
PARAMETER repeat_penalty 1
PARAMETER num_predict {max_tokens}
PARAMETER stop "{tokenizer.eos_token}"
'''


def model_card(recipe: dict, results: dict) -> str:
    """The README.md of a finished run: what was trained on what, how far it came, and how to use it.

    Args:
        recipe: the run's recipe.json.
        results: its results.json.
    """
    base, dataset = recipe["MODEL"], recipe["DATASET"]
    grpo = "REWARD_WEIGHTS" in recipe
    metadata = ModelCardData(
        language="zh",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if is_hub_id(base) else None,
        datasets=[dataset] if is_hub_id(dataset) else None,
        tags=["trl", "grpo" if grpo else "sft"],
    )
    base, dataset = (name if is_hub_id(name) else Path(name).name for name in (base, dataset))
    if grpo:
        what = f"GRPO on {dataset}"
        step = f"{recipe['QUESTIONS_PER_STEP']} questions x {recipe['COMPLETIONS_PER_QUESTION']} completions"
    else:
        what = f"supervised fine-tuning on {Path(recipe['TRACES']).name}"
        step = f"{recipe['ROWS_PER_STEP']} rows"
    settings = settings_of(recipe, results, step)
    question = json.dumps([{"role": "user", "content": recipe["PROBE_QUESTION"]}], ensure_ascii=False)
    figures = ""
    for when in ("before", "after"):
        e = results[when]
        figures += (
            f"| {when} | {e['strict']:.1%} | {e['strict_ci95'][0]:.1%} to {e['strict_ci95'][1]:.1%} "
            f"| {e['flexible']:.1%} | {e['format']:.1%} | {e['mean_tokens']:.0f} |\n"
        )
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""\
---
{metadata}
---

# {base} after {what}

{results["after"]["n"]} test questions of {dataset}, answered greedily. *strict*: the number inside the one answer block
equals the label; *flexible*: where there is no such number, the last one in the text counts.

| | strict | 95 % interval | flexible | format | tokens |
| --- | --- | --- | --- | --- | --- |
{figures}
| | |
| --- | --- |
{rows}

`recipe/` holds every constant and the scripts that made this model, `results.json` its figures.

## How to use it

In this folder; elsewhere its name on the hub takes the place of the dot. It answers one question at a time. Its chat
template adds the system prompt that it was trained under, and it answers greedily unless told otherwise:

```python
from transformers import pipeline

question = {question}
answer = pipeline("text-generation", ".")(question)
print(answer[0]["generated_text"][-1]["content"])
```

```bash
ollama create r1-zh -f Modelfile && ollama run r1-zh
```
"""


def settings_of(recipe: dict, results: dict, step: str) -> dict[str, object]:
    """What made the model, by name; `step` is one optimizer step in words."""
    rate = recipe["LORA_LEARNING_RATE"] if recipe["USE_LORA"] else recipe["LEARNING_RATE"]
    settings = {
        "steps": f"{results['steps']}, each of {step}",
        "trained": f"LoRA rank {recipe['LORA_RANK']}, merged" if recipe["USE_LORA"] else "all weights",
        "learning rate": f"{rate:g} at its peak",
        "seed": recipe["SEED"],
        "time": f"{results['train_seconds'] / 60:.0f} minutes on {results['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in recipe["versions"].items()),
    }
    if "REWARD_WEIGHTS" in recipe:
        weights = zip(recipe["REWARDS"], recipe["REWARD_WEIGHTS"], strict=True)
        settings["weights of the rewards"] = ", ".join(f"{name} {weight:g}" for name, weight in weights)
    return settings


def is_hub_id(name: str) -> bool:
    """Whether a model or data set has a page on the hub; everything else is a folder of this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
