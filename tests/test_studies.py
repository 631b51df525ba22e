"""The studies whose runs take hours work in their shortest form."""

import copy
import json
import re
import shutil
import sys
from types import SimpleNamespace

import bench_step
import check_gpu
import fuzz_rewards
import pytest
import real_model
import study_advantages
import study_gguf
import torch
from conftest import error_line, run_script

import train_grpo
from engine.console import UserError
from engine.models import find_beside, load_model
from engine.questions import load_questions, to_row


def test_real_model(demo_base, tmp_path):
    """Every arm is trained and measured, on the same questions; the same command finds all of it done."""
    base = [demo_base / "model", demo_base / "data", "--mgsm", demo_base / "data", "--cpu", "--output", tmp_path]
    for flags in ([], ["--cold", demo_base / "model"], ["--cold", demo_base / "model", "--traces", tmp_path]):
        line = error_line(run_script("studies/real_model.py", *base, *flags, expect=2))
        assert ("--traces" if flags else "--cold") in line and not list(tmp_path.iterdir())
    sifted = [tmp_path / name / "sifted" for name in ("traces", "more-traces")]
    for folder, train in zip(sifted, (slice(3, 30, 2), slice(40, 44)), strict=True):
        folder.mkdir(parents=True)
        for split, chosen in (("test", slice(None)), ("train", train)):
            rows = load_questions(str(demo_base / "data"), split).to_list()[chosen]
            lines = [json.dumps(to_row(row["prompt"][-1]["content"], row["answer"])) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    command = ["studies/real_model.py", *base, "--cold", demo_base / "model", "--steps", 1, "--questions", 6]
    command += ["--seed", 7]
    command += ["--arms", "cold", "sifted", "sifted-example", "example", "tutorial"]
    command += ["--traces", *(folder.parent for folder in sifted)]
    done = run_script(*command)
    expected = [row for folder in sifted for row in load_questions(str(folder), "train").to_list()]
    for arm in ("sifted", "sifted-example"):
        assert load_questions(str(tmp_path / f"{arm}-questions"), "train").to_list() == expected
    rows = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2 + 3 + 5 and len({row.count(" | ") for row in rows[2:]}) == 1
    arms = ("cold", "example", "tutorial", "sifted-example")
    read = {arm: json.loads((tmp_path / arm / "recipe/recipe.json").read_text()) for arm in arms}
    assert "..." in read["tutorial"]["SYSTEM_PROMPT"] and "..." not in read["cold"]["SYSTEM_PROMPT"]
    assert [len(read[arm]["EXAMPLE"]) for arm in arms] == [0, 2, 0, 2]
    assert read["tutorial"]["REWARD_WEIGHTS"][:5] == [1.0] * 5 and read["cold"]["REWARD_WEIGHTS"][4] > 1
    assert read["sifted-example"]["REWARD_WEIGHTS"][:4] == [0.0] * 4
    assert json.loads((tmp_path / "before-example/test/eval.json").read_text())["n"] == 6
    assert json.loads((tmp_path / "after-cold/test/eval.json").read_text())["samples"] == 4
    assert json.loads((tmp_path / "cold/results.json").read_text())["seed"] == 7
    compared = [" (p = " in row for row in rows[2:]]  # with the row of the model before it, which two arms may share
    assert compared == [False, True, True, False, True, True, False, True]
    assert (tmp_path / "rewards_real.png").read_bytes().startswith(b"\x89PNG")
    again = run_script(*command, "--resume")  # as the last line of a stopped run says
    assert again.stdout == done.stdout[-len(again.stdout) :] and "step" not in again.stdout.split("| --- |")[0]
    for flags, words in (  # argparse takes the last one
        (["--questions", 5], "holds other questions"),
        (["--traces", sifted[0].parent], "holds other questions"),
        (["--cold", tmp_path / "cold"], "was begun with cold"),
        (["--samples", 8], "was begun with samples 4"),
        (["--seed", 0], "was begun with seed 7"),
    ):
        line = error_line(run_script(*command, *flags, expect=2))
        assert words in line and "--output" in line


def test_real_model_compares_by_question(tmp_path):
    """Nine questions won and one lost, whatever else both have right or wrong: 2 * (1 + 10) / 2**10."""
    for name, marks in (("before", "1" + "0" * 9 + "110"), ("after", "0" + "1" * 9 + "110")):
        (tmp_path / name / "test").mkdir(parents=True)
        lines = [json.dumps({"completion": "\u2028", "strict": mark == "1"}, ensure_ascii=False) for mark in marks]
        (tmp_path / name / "test" / "eval.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    before, after = tmp_path / "before", tmp_path / "after"
    assert real_model.compare(before, after) == "9, 1 (p = 0.021)"
    assert real_model.compare(after, before) == "1, 9 (p = 0.021)" and "(p = 1)" in real_model.compare(after, after)


def test_bench_step_on_a_small_card(monkeypatch, capsys):
    """Where the default recipe does not fit, the benchmark says so and still writes what it measured before."""

    def run(gradient_checkpointing: bool, **others) -> dict:
        if not gradient_checkpointing:
            raise torch.OutOfMemoryError
        return {"peak": 11.25}

    monkeypatch.setattr(bench_step, "run", run)
    assert bench_step.bench_memory() == {"gradient_checkpointing=True": 11.25, "gradient_checkpointing=False": None}
    assert "gradient_checkpointing=False too much for this card" in capsys.readouterr().out


def test_check_gpu_makes_its_own_model():
    """The flags that the README names for train_grpo.py are refused: its ten steps would land in a run's folder."""
    for flags in (["--model", "output/sft"], ["--output=output/grpo"]):
        assert flags[0].split("=")[0] in error_line(run_script("studies/check_gpu.py", *flags, expect=2))


def test_check_gpu_trains_on_every_completion(monkeypatch):
    """What is rewarded alike is skipped, and then nothing is measured: where right answers alone are paid, too."""
    rewards, weights = list(train_grpo.REWARDS), [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    for name, value in {
        "REWARDS": rewards,
        "REWARD_WEIGHTS": weights,
        "SAVE_LIMIT": 3,
        "run": lambda main: None,
    }.items():
        monkeypatch.setattr(train_grpo, name, value)
    exec(check_gpu.START, {})
    texts = [[{"role": "assistant", "content": f"{i} 公里"}] for i in range(8)]
    assert len(set(rewards[0](texts))) == 8 and train_grpo.default_recipe()["REWARD_WEIGHTS"][0] > 0


def test_study_prompts(demo_base, tmp_path):
    """Each prompt is asked as the table says; what was asked is not asked again, nor mixed with another study."""
    command = ["studies/study_prompts.py", demo_base / "model", demo_base / "data", "--cpu", "--output", tmp_path]
    done = run_script(*command, "--questions", 4, "--prompts", "turn", "tutorial")
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("turn", "tutorial")
    }
    assert [row["question"] for row in rows["turn"]] == [row["question"] for row in rows["tutorial"]]
    assert min(row["prompt_tokens"] for row in rows["turn"]) > max(row["prompt_tokens"] for row in rows["tutorial"])
    test = {prompt[-1]["content"] for prompt in load_questions(str(demo_base / "data"), "test")["prompt"]}
    assert len(rows["turn"]) == 4 and not test & {row["question"] for row in rows["turn"]}
    again = run_script(*command, "--questions", 4, "--prompts", "turn", "tutorial")
    assert again.stdout.strip() in done.stdout and again.stdout.count("short example") == 1
    assert "--output" in error_line(run_script(*command, "--questions", 5, expect=2))


def test_bench_real_step(demo_base, tmp_path):
    """TRL and ours take a step each on the same questions; the tutorial's settings bring a reference model along."""
    file = tmp_path / "runs.json"
    base = ["--model", demo_base / "model", "--dataset", demo_base / "data", "--json", file]
    done = run_script("studies/bench_real_step.py", *base, "--rounds", 1)
    runs = json.loads(file.read_text(encoding="utf-8"))
    assert list(runs) == ["TRL, tutorial's settings", "TRL, our settings", "ours"]
    for [made] in runs.values():
        assert 0 < made["generation"] < made["seconds"] and made["tokens"] > 16
    assert "| ours |" in done.stdout


def test_fuzz_rewards(tmp_path):
    """Both kinds of text are tried, and earn all rewards often enough that the checks mean something."""
    file = tmp_path / "eval.jsonl"
    row = {"completion": "<think>\n9 * 2 = 18\n</think>\n<answer>\n18 元\n</answer>"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    for more in ([], ["--texts", file]):
        done = run_script("studies/fuzz_rewards.py", "--count", 3000, *more)
        assert "faults        none" in done.stdout
        shares = [float(share) for share in re.findall(r"([\d.]+)% \w+_reward", done.stdout)]
        assert len(shares) == 5 and min(shares) > 1
    file.write_text('{"question": "?"}\n', encoding="utf-8")
    assert "--texts" in error_line(run_script("studies/fuzz_rewards.py", "--texts", file, expect=2))


def test_fuzz_finds_a_broken_reward(monkeypatch):
    """A reward that pays a bare number, as the tutorial's does, does not pass."""
    monkeypatch.setattr(fuzz_rewards, "extract_answer", lambda text: text)
    with pytest.raises(UserError, match="one block|the block is a number"):
        fuzz_rewards.main(["--count", "2000"])


def test_study_advantages(demo_base, tmp_path):
    """The same completions under every set; correctness alone pays right ones only, and what is drawn is kept."""
    command = ["studies/study_advantages.py", demo_base / "model", demo_base / "data", "--cpu", "--output", tmp_path]
    done = run_script(*command, "--questions", 3)
    rows = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 * 8 and len({row["question"] for row in rows}) == 3
    assert f"right ({sum(row['strict'] for row in rows)})" in done.stdout
    assert run_script(*command, "--questions", 3).stdout == done.stdout
    totals = study_advantages.SETS["correctness only"](rows)
    assert totals == [2.0 * row["strict"] for row in rows]
    values, flat = study_advantages.advantages([0.0, 2.0, 1.0, 1.0], 2)
    assert values == pytest.approx([-1.2246, 1.2246, 0.0, 0.0], abs=1e-3) and flat == 0.5


def test_study_gguf(demo_base, tmp_path, monkeypatch, capsys):
    """The Modelfile's prompt and parameters reach the server, and an answer that departs is counted and placed."""
    from engine.model_card import modelfile
    from engine.models import encode, load_model
    from engine.questions import to_conversation
    from engine.rollout import make_sampler

    folder = str(demo_base / "model")
    model, tokenizer = load_model(folder)
    sampler = make_sampler(model.eval(), tokenizer)
    asked = []

    class Server:
        """In the place of llama.cpp: the model itself, which takes another third token in every second answer."""

        def __init__(self, settings):
            assert settings.model.path == "some.gguf"

        def handle_completions(self, request):
            asked.append(request)
            ids = tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
            (tokens,) = sampler.generate([ids], request["max_tokens"])
            if len(asked) % 2:
                tokens[2] += 1
            return {"__verbose": {"tokens_evaluated": len(ids), "tokens": tokens}}

    def params():
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

    monkeypatch.setitem(sys.modules, "xllamacpp", SimpleNamespace(CommonParams=params, Server=Server))
    saved = tmp_path / "model"
    with pytest.raises(UserError, match="Modelfile"):
        study_gguf.main([folder, "some.gguf", str(demo_base / "data")])
    with pytest.raises(UserError, match="--questions 0"):
        study_gguf.main([folder, "some.gguf", str(demo_base / "data"), "--questions", "0"])
    shutil.copytree(folder, saved)
    (saved / "Modelfile").write_text(modelfile(tokenizer, 40), encoding="utf-8")
    study_gguf.main([str(saved), "some.gguf", str(demo_base / "data"), "--questions", "4"])
    said = capsys.readouterr().out
    assert "of 4 answers the same to the last token 2" in said and said.count("part at 2") == 2
    assert asked[0]["temperature"] == 0 and asked[0]["max_tokens"] == 40 and asked[0]["stop"] == [tokenizer.eos_token]
    (ids,) = encode(tokenizer, [to_conversation("5分钟多少秒")])
    prompt, _ = study_gguf.read_modelfile(modelfile(tokenizer, 40))
    assert tokenizer(prompt.replace("{{ $question }}", "5分钟多少秒"), add_special_tokens=False)["input_ids"] == ids


def test_average_models(demo_base, tmp_path):
    """The mean of three is their mean, tied weights too, and answers as the first was asked; nothing is overwritten."""
    model, tokenizer = load_model(str(demo_base / "model"))
    for i, factor in enumerate((1, 2, 6)):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for weight in scaled.parameters():
                weight.mul_(factor)
        for part in (scaled, tokenizer):
            part.save_pretrained(tmp_path / str(i))
    (tmp_path / "0" / "recipe").mkdir()
    (tmp_path / "0" / "recipe" / "recipe.json").write_text('{"SYSTEM_PROMPT": "as the first"}')
    command = ["studies/average_models.py", *(tmp_path / str(i) for i in range(3)), "--output", tmp_path / "mean"]
    run_script(*command)
    mean, _ = load_model(str(tmp_path / "mean"))
    for ours, its in zip(mean.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, its * 3)
    assert find_beside(str(tmp_path / "mean"), "recipe/recipe.json") == {"SYSTEM_PROMPT": "as the first"}
    assert "in use" in error_line(run_script(*command, expect=2))
    smaller = type(model)(type(model.config)(**(model.config.to_dict() | {"intermediate_size": 8})))
    for part in (smaller, tokenizer):
        part.save_pretrained(tmp_path / "smaller")
    line = error_line(run_script(command[0], command[1], tmp_path / "smaller", "--output", tmp_path / "no", expect=2))
    assert "another architecture" in line and not (tmp_path / "no").exists()
    assert "alone" in error_line(run_script(command[0], command[1], "--output", tmp_path / "no", expect=2))
