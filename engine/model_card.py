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

# In the language of Go, for Ollama. Only the last question is sent, because the model knows no conversations.
LAST_QUESTION = (
    '{{ $question := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $question = .Content }}{{ end }}{{ end }}'
)
# What the card shows of recipe.json.
SETTINGS = (
    "QUESTIONS_PER_STEP COMPLETIONS_PER_QUESTION ROWS_PER_STEP LEARNING_RATE USE_LORA LORA_LEARNING_RATE LORA_RANK "
    "REWARDS REWARD_WEIGHTS SEED versions"
).split()


def modelfile(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """What `ollama create` reads: the saved model, its prompt, greedy decoding of at most `max_tokens`, the end token.

    Ollama finds no chat template in what transformers 5 saves, and its older versions have a repetition penalty by
    default, which acts at temperature 0 too.
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
    method = "GRPO" if "REWARD_WEIGHTS" in recipe else "SFT"
    metadata = ModelCardData(
        language="zh",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if is_hub_id(base) else None,
        datasets=[dataset] if is_hub_id(dataset) else None,
        tags=["trl", method.lower()],
    )
    figures = "".join(
        f"| {when} | {e['strict']:.1%} | {e['strict_ci95'][0]:.1%} to {e['strict_ci95'][1]:.1%} "
        f"| {e['flexible']:.1%} | {e['format']:.1%} | {e['mean_tokens']:.0f} |\n"
        for when, e in (("before", results["before"]), ("after", results["after"]))
    )
    settings = {name: recipe[name] for name in SETTINGS if name in recipe}
    settings |= {"steps": results["steps"], "seconds": round(results["train_seconds"]), "device": results["device"]}
    rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    # of a folder only the name, because the folders of this machine mean nothing elsewhere
    base, dataset = (name if is_hub_id(name) else Path(name).name for name in (base, dataset))
    question = json.dumps([{"role": "user", "content": recipe["PROBE_QUESTION"]}], ensure_ascii=False)
    return f"""\
---
{metadata}
---

# {base} after {method}

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


def is_hub_id(name: str) -> bool:
    """Whether a model or data set has a page on the hub; everything else is a folder of this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
