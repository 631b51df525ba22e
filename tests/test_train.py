"""train_grpo.py run as a user runs it, on a tiny model, and the rules that its constants and flags obey."""

import io
import json
import math
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, names_read, run_main, run_script
from safetensors.torch import load_file

import evaluate
import train_grpo
from engine import accuracy, models, runs
from engine.console import UserError
from engine.monitor import Monitor
from prompts import ANSWER_COLUMN, QUESTION_COLUMN

SHARED = ROOT.parent / "shared" / "data"
RESULT_KEYS = set(
    "model dataset seed steps device before after probe best finished train_seconds generated_tokens_per_second "
    "step_seconds peak_memory_gb".split()
)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> SimpleNamespace:
    """The whole demo as a user runs it, base and all: its folder, what it said, and its results."""
    output = tmp_path_factory.mktemp("demo") / "demo"
    done = run_script("train_grpo.py", "--demo", "--cpu", "--output", output)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return SimpleNamespace(output=output, stdout=done.stdout, stderr=done.stderr, results=results)


def eval_again(folder: Path, output: Path) -> dict:
    """What evaluate.py finds of a model, without what it was trained with but for the folder."""
    evaluate.main([str(folder), "--cpu", "--output", str(output)])
    return json.loads((output / "eval.json").read_text())


def test_the_demo_learns(demo_run):
    """The whole demo on one seed: from sloppy to right on held-out questions, and 5分钟多少秒 from 60 to 300."""
    results = demo_run.results
    before, after = results["before"]["strict"], results["after"]["strict"]
    assert before <= 0.5 and after >= 0.85 and after - before >= 0.4
    assert accuracy.grade(results["probe"]["before"], 60)["strict"]
    assert accuracy.grade(results["probe"]["after"], 300)["strict"]
    assert results["peak_memory_gb"] < 4 and math.isfinite(results["step_seconds"])
    assert (demo_run.output / "model.safetensors").exists()


def test_run_as_a_user(demo_run):
    """A run leaves everything that design and README promise, and says it."""
    output, said, results = demo_run.output, demo_run.stdout, demo_run.results
    assert "Warning" not in demo_run.stderr
    header, steps = said.split("step  1/50")[0], said.count("  reward ")
    assert steps == 50
    for word in ("CPU, float32", "questions x", "steps      50", str(output)):
        assert word in header
    for reward in ("mark", "soft_format", "hard_format", "digit", "correctness", "language"):
        assert reward in said  # the sample shows every reward

    assert set(results) == RESULT_KEYS and results["finished"] and results["steps"] == 50
    assert results["before"]["n"] == results["after"]["n"] >= 200
    for key, value in results.items():
        assert f"{key}:" in said, value  # the summary is results.json
    for name in ("adapter_config.json", "adapter"):
        assert not (output / name).exists()
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "Modelfile",
        "README.md",
        "runs",
        "samples.jsonl",
        "checkpoint-50",
    ):
        assert (output / name).exists(), name
    recipe = json.loads((output / "recipe" / "recipe.json").read_text(encoding="utf-8"))
    assert {"MODEL", "LEARNING_RATE", "REWARD_WEIGHTS", "SYSTEM_PROMPT", "versions"} <= set(recipe)
    assert (output / "recipe" / "rewards.py").read_text() == (ROOT / "rewards.py").read_text()

    before, after = (load_file(folder / "model.safetensors") for folder in (output / "base" / "model", output))
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert json.loads((output / "config.json").read_text())["use_cache"]  # the trainer's False would slow users
    moved = sum((before[k] != after[k]).sum().item() for k in before) / sum(t.numel() for t in before.values())
    assert moved > 0.9  # of all weights; bf16 master weights would leave most where they were


def test_what_was_saved_is_what_was_measured(demo_run, run_chat, tmp_path):
    """evaluate.py and chat.py repeat the `after` of the run on what it saved."""
    assert eval_again(demo_run.output, tmp_path) == demo_run.results["after"]
    said = run_chat(demo_run.output, stdin="5分钟多少秒\n").strip()
    assert said == demo_run.results["probe"]["after"].strip()


def test_finished_run_is_left_alone(demo_run):
    """Neither a new run in its folder nor --resume of it changes anything."""
    output, flags = demo_run.output, ["--demo", "--cpu", "--output", demo_run.output]

    def changed() -> dict[Path, int]:
        """When each file was written, but for the lock, in which every start names its process."""
        return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".lock"}

    files = changed()
    with pytest.raises(UserError, match="already holds a run.*--output"):
        run_main(train_grpo.main, *flags)
    with pytest.raises(UserError, match="finished"):
        run_main(train_grpo.main, *flags, "--resume")
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == demo_run.results
    assert changed() == files


def test_lora(demo_output, demo_base):
    """The adapter lies beside a merged model at the root, which is base plus adapter; all three evaluate alike. Whoever
    may read the configuration, a server under another account say, may read the weights."""
    run_main(train_grpo.main, "--demo", "--cpu", "--max-steps", 2, "--output", demo_output, USE_LORA=True)
    before, merged = load_file(demo_base / "model" / "model.safetensors"), load_file(demo_output / "model.safetensors")
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], merged[name])}
    assert moved == set(train_grpo.LORA_MODULES)
    assert json.loads((demo_output / "adapter" / "adapter_config.json").read_text())["r"] == train_grpo.LORA_RANK
    paths = ["config.json", "model.safetensors", "adapter/adapter_model.safetensors"]
    paths += ["checkpoint-2/trainer_state.json", "checkpoint-2/adapter_model.safetensors"]
    assert len({(demo_output / path).stat().st_mode for path in paths}) == 1
    model, _ = models.load_model(str(demo_output / "adapter"))
    state = model.state_dict()
    for name, tensor in merged.items():
        assert torch.allclose(state[name], tensor, atol=1e-6), name
    results = json.loads((demo_output / "results.json").read_text(encoding="utf-8"))
    for folder in (demo_output, demo_output / "adapter"):
        assert eval_again(folder, demo_output / "again") == results["after"]


def test_lora_under_autocast(demo_base, tmp_path):
    """Where training autocasts (on a CPU with bf16 units), the saved float32 model is the one that `after` is of."""
    small = {"USE_LORA": True, "LORA_LEARNING_RATE": 1e-3, "QUESTIONS_PER_STEP": 2, "MAX_COMPLETION_TOKENS": 32}
    small["DEV_QUESTIONS"] = 8
    run_main(
        train_grpo.main, "--cpu", "--max-steps", 2, "--output", tmp_path / "run", "--model", demo_base / "model",
        "--dataset", demo_base / "data", **small,
    )  # fmt: skip
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert eval_again(tmp_path / "run", tmp_path / "again") == results["after"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real questions and the real tokenizer beside the project")
def test_real_questions_and_tokenizer(tmp_path, capsys):
    """The recipe's own prompt lengths, template and stop token on real text; only the weights are random."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    lines = [line.split("\t") for line in (SHARED / "mgsm_zh.tsv").read_text(encoding="utf-8").splitlines()]
    rows = [{QUESTION_COLUMN: q, ANSWER_COLUMN: int(a.replace(",", ""))} for q, a in lines]
    parts = {"train": Dataset.from_list(rows[:200]), "test": Dataset.from_list(rows[200:206])}
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5_tokenizer")
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"eos_token_id": 151645, "pad_token_id": 151643, "bos_token_id": None}
    config = Qwen2Config(vocab_size=151936, num_hidden_layers=1, tie_word_embeddings=True, **shape, **ends)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")

    small = {"QUESTIONS_PER_STEP": 2, "COMPLETIONS_PER_QUESTION": 4, "MAX_COMPLETION_TOKENS": 16, "MICRO_BATCH": 4}
    small["DEV_QUESTIONS"] = 8
    run_main(
        train_grpo.main, "--cpu", "--max-steps", 2, "--output", tmp_path / "run", "--model", tmp_path / "model",
        "--dataset", tmp_path / "data", **small,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "192 training questions (0 longer than 384 tokens dropped), 8 development and 6 test questions" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["steps"] == 2 and results["after"]["n"] == 6
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [sample["question"], str(sample["label"])] in [[q, a.replace(",", "")] for q, a in lines]


def test_without_a_gpu():
    """The real command on a machine without CUDA: one line that names the ways on, and nothing written."""
    before = sorted((ROOT / "output").iterdir())
    with pytest.raises(UserError, match="CUDA.*--demo.*--cpu"):
        run_main(train_grpo.main)
    assert sorted((ROOT / "output").iterdir()) == before


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--max", "3"], ["--max-steps", "many"], ["stray"]])
def test_unknown_flags(arguments, capsys):
    """An unknown, abbreviated or malformed flag exits 2 before anything is loaded."""
    with pytest.raises(SystemExit) as left:
        train_grpo.configure(arguments, {})  # the first thing that main does
    assert left.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_unknown_constant(tmp_path):
    """A misspelt argument of main is named, with those that there are."""
    with pytest.raises(UserError, match="no constant 'QUESTION_PER_STEP' to set; there are .*QUESTIONS_PER_STEP"):
        run_main(train_grpo.main, "--cpu", "--output", tmp_path / "run", QUESTION_PER_STEP=4)
    assert not (tmp_path / "run").exists()


def test_unreachable_hub(tmp_path):
    """Without the hub, the line names the data set, the local folder and the mirror; no folder is made."""
    with pytest.raises(UserError) as error:
        run_main(train_grpo.main, "--cpu", "--output", tmp_path / "run")
    line = str(error.value)
    assert train_grpo.DATASET in line and "HF_ENDPOINT" in line and "--dataset" in line
    assert not (tmp_path / "run").exists()


def test_batch_arithmetic():
    """The same completions per step on any number of processes; what does not divide is refused with the numbers."""
    step = ("QUESTIONS_PER_STEP", "COMPLETIONS_PER_QUESTION")
    recipe = SimpleNamespace(**train_grpo.default_recipe() | {"MICRO_BATCH": 16})
    assert [runs.accumulation_steps(recipe, step, n) for n in (1, 2, 8, 16)] == [16, 8, 2, 1]
    words = "QUESTIONS_PER_STEP 32 x COMPLETIONS_PER_QUESTION 8 = 256 rows .* MICRO_BATCH 16 on 3 process"
    with pytest.raises(UserError, match=words):
        runs.accumulation_steps(recipe, step, 3)


def test_long_prompts_are_dropped():
    """Questions longer than the limit go, the rest keeps its order; too few left is an error that names the numbers."""
    from datasets import Dataset

    class Letters:
        """A tokenizer of one token per character."""

        def apply_chat_template(self, conversations, **_):
            return {"input_ids": [list(messages[-1]["content"]) for messages in conversations]}

    prompts = [[{"role": "user", "content": "x" * length}] for length in (5, 257, 256, 9)]
    questions = Dataset.from_dict({"prompt": prompts, "answer": [0, 1, 2, 3]})
    assert models.drop_long(questions, Letters(), 256, 3)["answer"][:] == [0, 2, 3]
    with pytest.raises(UserError, match="^3 .* QUESTIONS_PER_STEP 4 .1 longer than MAX_PROMPT_TOKENS 256"):
        models.drop_long(questions, Letters(), 256, 4)


def test_trackers_are_an_option(tmp_path):
    """A tracker that is not installed is one line that names it; TensorBoard is written anyway."""
    for name in ("swanlab", "nonsense", "tensorboard"):
        with pytest.raises(UserError, match=f"REPORT_TO = '{name}' .*pip install.*TensorBoard"):
            train_grpo.configure(["--demo", "--cpu"], {"REPORT_TO": name})
    recipe = SimpleNamespace(**train_grpo.default_recipe() | {"OUTPUT_DIR": str(tmp_path), "REPORT_TO": "wandb"})
    assert train_grpo.grpo_config(recipe, True, False, 32).report_to == ["wandb"]  # what the trainer is given


def test_missing_folders_are_refused_by_constant(tmp_path):
    """An edited constant is looked at like a flag, and the line says which of the two folders is not there."""
    for constant in ("MODEL", "DATASET"):
        with pytest.raises(UserError, match=rf"{constant} \(--{constant.lower()}\): there is no folder"):
            run_main(train_grpo.main, "--cpu", "--output", tmp_path / "run", **{constant: str(tmp_path / "nowhere")})


def test_modules_that_the_model_has_not(demo_base, tmp_path):
    """A misspelt or an empty LORA_MODULES is one line with the names to choose from."""
    flags = ["--cpu", "--model", demo_base / "model", "--dataset", demo_base / "data", "--output", tmp_path / "run"]
    with pytest.raises(UserError, match="LORA_MODULES.*'qproj'.*q_proj, "):
        run_main(train_grpo.main, *flags, USE_LORA=True, LORA_MODULES=["q_proj", "qproj"])
    with pytest.raises(UserError, match="LORA_MODULES = \\[\\] is not one name or more"):
        run_main(train_grpo.main, *flags, LORA_MODULES=[])


def test_kl_to_an_adapters_base_is_refused(tmp_path):
    """TRL would take what the adapter was trained on, and not the model with it, for the untrained one."""
    (tmp_path / "adapter_config.json").write_text("{}")
    train_grpo.configure([], {"MODEL": str(tmp_path)})
    with pytest.raises(UserError, match="BETA = 0.04 with the adapter"):
        train_grpo.configure([], {"MODEL": str(tmp_path), "BETA": 0.04})


def test_bf16_decides_over_accelerate_config(monkeypatch):
    """`accelerate launch` hands its workers the answer to `accelerate config`, which the trainers would follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    flags, recipe = train_grpo.configure(["--demo", "--cpu"], {"BF16": False})
    _, autocast = runs.start_processes(flags, recipe.BF16)
    assert autocast is None and os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert not train_grpo.grpo_config(recipe, True, False, 32).fp16


def test_steps_of_a_part_of_an_epoch():
    """EPOCHS 0.5 is a whole number of steps in the header, the one that the trainer makes."""
    recipe = SimpleNamespace(**train_grpo.default_recipe() | {"EPOCHS": 0.5})
    device = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    args = SimpleNamespace(bf16=False)
    watch = Monitor.__new__(Monitor)
    watch.recipe, watch.dev, watch.test = recipe, [], []
    watch.trainer = SimpleNamespace(train_dataset=range(7459), accelerator=device, args=args)
    with redirect_stdout(io.StringIO()) as said:
        watch.print_header(dropped=0)
    assert "steps      117\n" in said.getvalue()  # half of 233


def test_flags_override_constants():
    """Each flag sets its one constant, the demo's recipe sets its own, an argument wins over the demo, a flag over all.
    The constants of the file stay as they are."""
    flags = "--model m --dataset d --output o --max-steps 7 --seed 8".split()
    before = train_grpo.default_recipe()
    _, recipe = train_grpo.configure(flags, {"SEED": 9, "BETA": 0.5})
    assert [recipe.MODEL, recipe.DATASET, recipe.OUTPUT_DIR, recipe.MAX_STEPS, recipe.SEED] == ["m", "d", "o", 7, 8]
    assert recipe.BETA == 0.5 and train_grpo.default_recipe() == before
    _, demo = train_grpo.configure(["--demo"], {})
    assert demo.OUTPUT_DIR == "output/demo" and not demo.BF16 and demo.LOSS_TYPE == train_grpo.LOSS_TYPE
    assert train_grpo.configure([], {})[1].OUTPUT_DIR == "output/grpo"  # beside other runs, in one --logdir
    assert train_grpo.configure(["--demo"], {"MAX_STEPS": 2})[1].MAX_STEPS == 2
    assert train_grpo.configure(["--demo", "--max-steps", "3"], {"MAX_STEPS": 2})[1].MAX_STEPS == 3


def test_demo_overrides_existing_constants():
    """demo.RECIPE can only change constants that exist; a misspelt one would silently do nothing."""
    from engine import demo

    assert set(demo.RECIPE) <= set(train_grpo.default_recipe())


def test_no_dead_constant():
    """Every constant of train_grpo.py is used somewhere, as `recipe.NAME` or `recipe["NAME"]`."""
    assert set(train_grpo.default_recipe()) <= names_read()
    names = re.findall(r"^([A-Z0-9_]+)(?:: \S.*)? = ", (ROOT / "train_grpo.py").read_text(encoding="utf-8"), flags=re.M)
    edited = {"REWARDS", "REWARD_WEIGHTS", "SYSTEM_PROMPT", "EXAMPLE"}  # of rewards.py and prompts.py
    assert set(names) == set(train_grpo.default_recipe()) - edited  # none without a type


@pytest.mark.parametrize(
    ("cuda", "bf16", "cpu", "units", "expected"),
    [
        (True, True, False, {}, ("cuda", torch.bfloat16)),
        (True, False, False, {}, ("cuda", None)),  # V100, T4: float32, never fp16
        (True, True, True, {"avx512_f": True}, ("cpu", None)),  # without units of its own bf16 is emulated, and slow
        (False, False, False, {}, ("cpu", None)),
        (False, False, False, {"avx512_bf16": True}, ("cpu", torch.bfloat16)),
        (True, False, True, {"amx_bf16": True}, ("cpu", torch.bfloat16)),
    ],
)
def test_device_and_precision(monkeypatch, cuda, bf16, cpu, units, expected):
    """bf16 autocast only where the GPU or the CPU has the units for it, asked without emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    device, autocast = models.pick_device(cpu)
    assert (device.type, autocast) == expected
    assert models.pick_device(cpu, bf16=False) == (device, None)  # BF16 = False
