"""Does llama.cpp, on which Ollama runs, answer as chat.py does? Asked as the Modelfile of a saved model says.

    pip install xllamacpp    # llama.cpp for Python; convert_hf_to_gguf.py is llama.cpp's own
    python convert_hf_to_gguf.py output --outtype f16 --outfile output.gguf
    python studies/study_gguf.py output output.gguf DATA

Twenty test questions, always the same. Both answer greedily, llama.cpp one question at a time; where they part, our
model says how near the two tokens were: f16 weights are rounded, and at a near tie a rounding decides.
"""

import argparse
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.console import UserError, run
from engine.numbers import extract_answer
from engine.questions import load_questions, to_conversation

QUESTIONS = 20


def read_modelfile(text: str) -> tuple[str, dict[str, str]]:
    """The prompt of one question, `{{ $question }}` in the place of it, and the parameters."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    system = re.search(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    prompt = template.rpartition("{{ end }}")[2].replace("{{ .System }}", system)
    return prompt, dict(re.findall(r'^PARAMETER (\S+) "?(.*?)"?$', text, re.MULTILINE))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="llama.cpp beside chat.py", allow_abbrev=False)
    parser.add_argument("model", help="a folder that train_grpo.py or train_sft.py saved")
    parser.add_argument("gguf", help="the same, converted")
    parser.add_argument("dataset", help="hub id or folder")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of the test split")
    flags = parser.parse_args(argv)
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError("llama.cpp is missing: pip install xllamacpp") from error
    asked = [prompt[-1]["content"] for prompt in load_questions(flags.dataset, "test")["prompt"]]
    if not 1 <= flags.questions <= len(asked):
        raise UserError(f"--questions {flags.questions}: from 1 to the {len(asked)} of {flags.dataset!r}")
    modelfile = Path(flags.model, "Modelfile")
    if not modelfile.exists():
        raise UserError(f"{modelfile} is missing: name a folder that a finished run saved")

    import torch

    from engine.models import encode, load_model, render
    from engine.rollout import make_sampler

    template, parameters = read_modelfile(modelfile.read_text(encoding="utf-8"))
    limit = int(parameters["num_predict"])
    model, tokenizer = load_model(flags.model)
    sampler = make_sampler(model.eval(), tokenizer)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = flags.gguf, 2048, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)

    conversations = [to_conversation(question) for question in random.Random(0).sample(asked, flags.questions)]
    encoded = encode(tokenizer, conversations)
    completions = sampler.generate(encoded, limit)
    same = agree = 0
    for number, (conversation, ids, ours) in enumerate(zip(conversations, encoded, completions, strict=True), start=1):
        prompt = template.replace("{{ $question }}", conversation[-1]["content"])
        if prompt != (trained := render(tokenizer, conversation)):
            raise UserError(f"{modelfile} asks {prompt!r}, and chat.py {trained!r}")
        request = {name: float(parameters[name]) for name in ("temperature", "repeat_penalty")}
        request |= {"prompt": prompt, "max_tokens": limit, "stop": [parameters["stop"]]}
        answered = server.handle_completions(request | {"return_tokens": True, "verbose": True})["__verbose"]
        if (read := answered["tokens_evaluated"]) != len(ids):
            raise UserError(f"llama.cpp reads {read} tokens of a prompt of {len(ids)}: {prompt!r}")
        ours, theirs = ([token for token in row if token not in sampler.eos] for row in (ours, answered["tokens"]))
        numbers = [extract_answer(tokenizer.decode(row, skip_special_tokens=True)) for row in (ours, theirs)]
        agree += numbers[0] == numbers[1]
        said = f"{number:2}  {len(ours):3} tokens  answers {numbers[0]!r}, llama.cpp {numbers[1]!r}  "
        if ours == theirs:
            same += 1
            print(said + "the same", flush=True)
            continue
        shared = zip(ours, theirs, strict=False)
        place = next((i for i, (one, other) in enumerate(shared) if one != other), min(len(ours), len(theirs)))
        with torch.no_grad():
            logits = model(torch.tensor([ids + ours[:place]])).logits[0, -1]
        rivals = [row[place] if place < len(row) else sampler.eos[0] for row in (ours, theirs)]  # or one has ended
        gap = (logits[rivals[0]] - logits[rivals[1]]).item()
        words = [repr(tokenizer.decode([token])) for token in rivals]
        print(f"{said}part at {place}: {words[0]}, llama.cpp {words[1]}; our logits {gap:.3f} apart", flush=True)
    print(f"\nof {flags.questions} answers the same to the last token {same}, in the answer block {agree}")


if __name__ == "__main__":
    run(main)
