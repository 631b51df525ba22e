"""How often is the demo's base right by itself, and if careful first words are put into its mouth?

python studies/demo_base.py      # makes the base in output/demo/base where it is not there yet
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine import demo
from engine.accuracy import grade
from engine.console import run
from engine.models import load_model
from engine.questions import to_prompt
from engine.rollout import make_sampler
from engine.templates import encode


def main() -> None:
    """Make the base, then show that it can compute but mostly does not care to."""
    started = time.perf_counter()
    model_folder, _ = demo.make_demo("output/demo/base")
    print(f"base: in {model_folder} after {time.perf_counter() - started:.0f} s")
    problems = demo.draw_problems("test", demo.TEST_QUESTIONS)
    model, tokenizer = load_model(model_folder)
    sampler = make_sampler(model.eval(), tokenizer, None)
    prompts = encode(tokenizer, [to_prompt(p.question) for p in problems])
    right = {}
    for column, forced in (("by itself", ""), ("if careful", f"<think>\n{demo.CAREFUL}")):
        begun = [ids + tokenizer(forced)["input_ids"] for ids in prompts]
        completions = sampler.generate(begun, demo.RECIPE["MAX_COMPLETION_TOKENS"])
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        right[column] = [grade(forced + t, p.answer)["strict"] for t, p in zip(texts, problems, strict=True)]
    print(f"{'right':<10}" + "".join(f"{column:>12}" for column in right))
    for kind in [*demo.KINDS, "all"]:
        chosen = [i for i, p in enumerate(problems) if kind in (p.kind, "all")]
        print(f"{kind:<10}" + "".join(f"{sum(row[i] for i in chosen) / len(chosen):>12.1%}" for row in right.values()))


if __name__ == "__main__":
    run(main)
