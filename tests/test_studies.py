"""The studies, which are run by hand and for hours, work in their shortest form."""

import json
import logging
import re
import shutil
import sys

import bench_speed
import check_gpu
import check_rollout
import compare_arms
import draw_results
import fuzz_rewards
import pytest
import soak_faults
import study_demo
import study_rewards
import train_with

import train_grpo
from engine import demo
from engine.console import UserError
from engine.questions import load_questions, load_splits, to_row


# --------------------------------------------------------------------------------------------------- other constants
@pytest.fixture
def seen(monkeypatch):
    """What each training is called with, instead of a training: the flags and the recipe that it would run under."""
    runs = []

    def main(argv=None, **constants):
        _, recipe = train_grpo.configure(argv or [], constants)
        runs.append((argv, vars(recipe)))

    monkeypatch.setattr(train_grpo, "main", main)
    return runs


def test_constants_hold_for_one_training(seen, monkeypatch, tmp_path):
    """They win over the file's and the demo's, without naming other ones, and are as before when it is over."""

    def train_with_words(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train_with.py", *words])
        train_with.main()

    before = train_grpo.default_recipe() | demo.RECIPE
    train_with_words("BETA=0.5", "MAX_STEPS=3", "--demo")
    study_rewards.train_variant("tutorial", 0, 3, demo.folders(tmp_path / "run/base"), tmp_path / "run")
    train_with_words("--demo")
    (_, changed), (_, tutorial), (_, unchanged) = seen
    assert (changed["BETA"], changed["MAX_STEPS"]) == (0.5, 3)
    assert tutorial["REWARDS"] is study_rewards.TUTORIAL and tutorial["REWARD_WEIGHTS"] == study_rewards.EQUAL
    assert {name: unchanged[name] for name in before if name not in ("MODEL", "DATASET")} == {
        name: value for name, value in before.items() if name not in ("MODEL", "DATASET")
    }
    with pytest.raises(UserError, match="BETTA"):
        train_with_words("BETTA=1")
    with pytest.raises(UserError, match="MODEL=Qwen"):
        train_with_words("MODEL=Qwen")


def test_the_soak_saves_after_every_step(seen, monkeypatch):
    """The command that is killed again and again trains the demo in small steps and saves after each."""
    monkeypatch.setattr(sys, "argv", [*soak_faults.START, "--cpu", "--output", "x", "--max-steps", "9", "--resume"])
    train_with.main()
    [(argv, recipe)] = seen
    assert argv == ["--demo", "--cpu", "--output", "x", "--max-steps", "9", "--resume"]
    step = recipe["QUESTIONS_PER_STEP"] * recipe["COMPLETIONS_PER_QUESTION"]
    assert recipe["SAVE_EVERY"] == 1 and recipe["MICRO_BATCH"] == step == 32


# ------------------------------------------------------------------------------------------------- bench_speed.py
SMALL = ["--questions", "2", "--tokens", "12", "--rounds", "1", "--micro-batch", "4"]


@pytest.fixture
def loud():
    """The benchmark silences what the libraries say; afterwards they may speak again."""
    yield
    logging.disable(logging.NOTSET)


def test_bench_speed(tmp_path, capsys, loud):
    """TRL and ours train on the same completions, ours with fewer tokens, and with fewer still where groups are flat;
    the tutorial's settings pass all of them through a reference model as well."""
    file = tmp_path / "speed.json"
    flags = ["--what", "training", "--weights", "full", "--flat", "0", "0.4", "0.7", "--json", str(file)]
    bench_speed.main([*SMALL, *flags])  # 40 and 70 % of two groups are one
    rows = [run["figures"] for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]
    tutorial, trl, ours, flat = (row["tokens computed"] for row in rows)
    assert tutorial > 1.5 * trl and trl > ours > 1.3 * flat > 0
    assert all(row["peak GB"] > 0.1 and row["training half s"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert "floor at this machine's" in said and "| this project; 50% of groups flat |" in said


def test_bench_speed_of_a_real_model(demo_base, tmp_path, capsys, loud):
    """With a model's folder and its samples these are trained on, cut at the limit; a step draws its own completions,
    and generation alone trains nothing."""
    model, file, traces = str(demo_base / "model"), tmp_path / "speed.json", tmp_path / "questions.jsonl"
    samples = [{"text": "<think>\n5*60=300\n</think>" + "好" * i, "ended": True} for i in range(8)]
    lines = [{"question": f"{i}分钟多少秒", "samples": samples} for i in (5, 6)]
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = ["--model", model, "--traces", str(traces), "--weights", "lora", "--variants", "ours", "--flat", "0"]
    bench_speed.main([*SMALL, *flags, "--what", "training", "generation", "step", "--json", str(file)])
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    training, generation, step = (run["figures"] for run in runs)
    assert [run["what"] for run in runs] == ["training", "generation", "step"]
    assert training.keys() & generation.keys() == {"peak GB"} and step.keys() > training.keys() | generation.keys()
    assert 16 <= step["tokens drawn"] <= 16 * 12 and step["step s"] > step["training half s"] > 0
    assert "12 tokens, the replayed ones 12 on average" in capsys.readouterr().out
    with pytest.raises(UserError, match="--questions 3"):
        bench_speed.main([*flags, "--questions", "3"])
    with pytest.raises(UserError, match="go together"):
        bench_speed.main(["--model", model])


def test_bench_speed_loads_another_checkout(tmp_path):
    """Its trainer runs on its own modules, also of the time before engine/, and ours stay what they are."""
    new, old = tmp_path / "new", tmp_path / "old"
    shutil.copytree(bench_speed.ROOT / "engine", new / "engine")
    for name in ("prompts.py", "rewards.py"):
        shutil.copy(bench_speed.ROOT / name, new)
    console = new / "engine" / "console.py"
    console.write_text(console.read_text(encoding="utf-8") + "\nMARK = 1\n", encoding="utf-8")
    old.mkdir()
    (old / "console.py").write_text("MARK = 2\n")
    (old / "trainer.py").write_text("import console, prompts\nclass LeanGRPOTrainer:\n    mark = console.MARK\n")
    (old / "prompts.py").write_text("")
    (old / "rollout.py").write_text("class Rollout:\n    pass\n")
    before = {name: sys.modules.get(name) for name in ("engine", "engine.trainer", "prompts", "console")}
    theirs, oldest = bench_speed.load_checkout(new), bench_speed.load_checkout(old)
    assert theirs.trainer is not bench_speed.LeanGRPOTrainer and theirs.rollout is not bench_speed.Rollout
    used = theirs.trainer._load_from_checkpoint.__globals__["UserError"]
    assert used is not UserError and used.__module__ == "engine.console" and oldest.trainer.mark == 2
    assert {name: sys.modules.get(name) for name in before} == before and before["console"] is None
    assert not [path for path in sys.path if path.startswith(str(tmp_path))]
    for folder in (tmp_path, bench_speed.ROOT):
        with pytest.raises(UserError, match="--against"):
            bench_speed.load_checkout(folder)


def test_bench_speed_compares_round_by_round():
    """Medians with smallest and largest; a ratio is of one round, and generation is compared by tokens a second."""
    runs = [
        {"what": what, "weights": "full", "variant": name, "flat": flat, "figures": figures}
        for a, b in ((2, 1), (6, 2), (8, 2))
        for what, name, flat, figures in (
            ("training", "TRL", 0.0, {"training half s": a, "tokens computed": 100}),
            ("training", "ours", 0.4, {"training half s": b, "tokens computed": 50}),
            ("generation", "TRL", 0.0, {"generation s": a, "tokens/s": 10.0}),
            ("generation", "ours", 0.0, {"generation s": a, "tokens/s": 10.0 * b}),
        )
    ]
    assert bench_speed.table(runs, "training", "full").splitlines()[4:] == [
        "| TRL | 6.00 (2.00 to 8.00) | 100 | 1.00 |",
        "| ours; 40% of groups flat | 2.00 (1.00 to 2.00) | 50 | 3.00 (2.00 to 4.00) |",
    ]
    assert bench_speed.table(runs, "generation", "full").endswith("| 20 (10 to 20) | 2.00 (1.00 to 2.00) |")


# ------------------------------------------------------------------------------------------- the checks of a machine
def test_check_rollout(capsys):
    """The loop agrees with transformers here, too."""
    check_rollout.main()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_check_gpu_makes_its_own_model(monkeypatch):
    """The flags that the README names for train_grpo.py are refused: its ten steps would land in a run's folder."""
    for flags in (["--model", "output/sft"], ["--output=output/grpo"]):
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", *flags])
        with pytest.raises(UserError, match=flags[0].split("=")[0]):
            check_gpu.main()


def test_check_gpu_trains_on_every_completion(seen, monkeypatch):
    """What is rewarded alike is skipped, and then nothing is measured: where right answers alone are paid, too."""
    monkeypatch.setattr(train_grpo, "REWARD_WEIGHTS", [0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    monkeypatch.setattr(train_grpo, "run", lambda main: main())
    exec(check_gpu.START, {})
    [(_, recipe)] = seen
    texts = [[{"role": "assistant", "content": f"{i} 公里"}] for i in range(8)]
    assert len(set(recipe["REWARDS"][0](texts))) == 8 and recipe["REWARD_WEIGHTS"][0] > 0
    assert recipe["REWARDS"][0] not in train_grpo.REWARDS


def test_fuzz_rewards(tmp_path, capsys):
    """Both kinds of text are tried, and earn all rewards often enough that the checks mean something."""
    file = tmp_path / "eval.jsonl"
    row = {"completion": "<think>\n9 * 2 = 18\n</think>\n<answer>\n18 元\n</answer>"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    for more in ([], ["--texts", str(file)]):
        fuzz_rewards.main(["--count", "3000", *more])
        said = capsys.readouterr().out
        assert "faults        none" in said
        shares = [float(share) for share in re.findall(r"([\d.]+)% \w+_reward", said)]
        assert len(shares) == 5 and min(shares) > 1
    file.write_text('{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="--texts"):
        fuzz_rewards.main(["--texts", str(file)])


def test_fuzz_finds_a_broken_reward(monkeypatch):
    """A reward that pays a bare number, as the tutorial's does, does not pass."""
    monkeypatch.setattr(fuzz_rewards, "extract_answer", lambda text: text)
    with pytest.raises(UserError, match="one block|the block is a number"):
        fuzz_rewards.main(["--count", "2000"])


# ------------------------------------------------------------------------------------------------------- many runs
@pytest.fixture
def small_data(demo_base, tmp_path):
    """A data set folder with a few of the demo's questions."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 30), ("test", 6)):
        rows = load_questions(str(demo_base / "data"), split).to_list()[:count]
        lines = [json.dumps(to_row(row["prompt"][-1]["content"], row["answer"])) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_compare_arms(demo_base, small_data, tmp_path, capsys):
    """Every arm is trained under its own constants and measured; the same command finds it done, another is refused."""
    output = tmp_path / "arms"
    command = [str(demo_base / "model"), str(small_data), "--cpu", "--output", str(output)]
    command += ["--train", str(demo_base / "data"), "--arms", "right", "tutorial", "--seeds", "7", "--steps", "1"]
    command += ["--questions", "4", "--samples", "1", "--set", "MAX_COMPLETION_TOKENS=24", "QUESTIONS_PER_STEP=1"]
    compare_arms.main(command)
    table = (output / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 3 + 2 and len({line.count(" | ") for line in table[:5]}) == 1
    assert ["(sign test: p = " in line for line in table[2:5]] == [False, True, True]
    assert table[5] == "" and table[6].startswith("tutorial against right, over 1 seeds: pass@1 ")
    recipes = [json.loads((output / f"{arm}-7/recipe/recipe.json").read_text()) for arm in ("right", "tutorial")]
    assert [recipe["REWARD_WEIGHTS"][:2] for recipe in recipes] == [[0.0, 0.0], [1.0, 1.0]]
    assert {recipe["MAX_COMPLETION_TOKENS"] for recipe in recipes} == {24} and recipes[0]["SEED"] == 7
    read = {
        name: json.loads((output / f"after-right-7/{name}/eval.json").read_text()) for name in ("greedy", "sampled")
    }
    assert read["greedy"]["n"] == 6 and read["sampled"]["n"] == 4 and read["sampled"]["samples"] == 1
    parts = load_splits(str(output / "questions"), train_grpo.DEV_QUESTIONS)
    assert [len(rows) for rows in parts] == [demo.TRAIN_QUESTIONS - train_grpo.DEV_QUESTIONS, compare_arms.WATCHED, 6]
    assert parts[0]["prompt"][:] == load_splits(str(demo_base / "data"), train_grpo.DEV_QUESTIONS)[0]["prompt"][:]
    capsys.readouterr()
    compare_arms.main(command)
    said = capsys.readouterr().out
    assert "=====" not in said and "\n".join(table) in said
    with pytest.raises(UserError, match="steps 1, not 2.*--output"):
        compare_arms.main([*command, "--steps", "2"])


def test_compare_arms_over_seeds(tmp_path):
    """A question's samples under all seeds of an arm count together."""
    for name, marks in (("after-right-7", "10"), ("after-right-8", "11")):
        (tmp_path / name / "sampled").mkdir(parents=True)
        lines = [json.dumps({"samples": [{"strict": mark == "1"}]}) + "\n" for mark in marks]
        (tmp_path / name / "sampled" / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = compare_arms.pooled([tmp_path / "after-right-7", tmp_path / "after-right-8"])
    assert [[answer["strict"] for answer in row["samples"]] for row in rows] == [[True, True], [False, True]]


def test_study_demo(tmp_path, monkeypatch, capsys):
    """A row a run; a finished run is not made again, a stopped one goes on."""
    asked = []

    def train(argv, FAST_ROLLOUT):
        folder, seed = (argv[argv.index(flag) + 1] for flag in ("--output", "--seed"))
        asked.append((FAST_ROLLOUT, seed, "--resume" in argv))
        probe = "<think>\n1\n</think>\n<answer>\n300\n</answer>"
        results = {"finished": True, "seed": int(seed), "step_seconds": 0.5, "train_seconds": 20.0}
        results |= {"before": {"strict": 0.25}, "after": {"strict": 1.0}, "probe": {"before": "60", "after": probe}}
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(train_grpo, "main", train)
    monkeypatch.setattr(demo, "make_demo", lambda folder: (str(folder / "model"), str(folder / "data")))
    (tmp_path / "TRL-0" / "checkpoint-25").mkdir(parents=True)
    study_demo.main(["--seeds", "1", "--output", str(tmp_path)])
    assert asked == [(True, "0", False), (False, "0", True)]
    assert "| TRL | 0 | 25.0% -> 100.0% | none -> 300 | 0.50 s | 20 s |" in capsys.readouterr().out
    study_demo.main(["--seeds", "2", "--output", str(tmp_path)])
    assert [seed for _, seed, _ in asked[2:]] == ["1", "1"]


def test_draw_results(tmp_path, monkeypatch):
    """Both pictures are drawn from the figures in results.json; without a Chinese font the second one is refused."""
    shutil.copy(draw_results.DOCS / "results.json", tmp_path)
    monkeypatch.setattr(draw_results, "DOCS", tmp_path)
    monkeypatch.setattr(draw_results, "find_fonts", lambda text: ["DejaVu Sans"] if text.isascii() else None)
    assert draw_results.draw("").stat().st_size > 10_000
    with pytest.raises(UserError, match="Chinese characters"):
        draw_results.draw(".zh")
