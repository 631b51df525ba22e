"""Inputs are what they contain, not what they are called: weights, rows, folders and files, and what is wrong there."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_main
from datasets import Dataset, load_from_disk
from test_checkpoints import SMALL
from test_traces import Boxer, Letters, write_data

import make_traces
import train_grpo
import train_sft
from engine import checkpoints
from engine.console import UserError
from engine.fingerprints import fingerprint_rows, fingerprint_weights
from engine.questions import load_questions, load_splits, pairs_of, to_row
from engine.traces import to_trace
from prompts import ANSWER_COLUMN, QUESTION_COLUMN

ROWS = [to_row(f"小明第{i}次买了几个？", i) for i in range(20)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make(folder: Path, train: str | bytes, test: str | bytes | None = None, ending: str = "jsonl") -> str:
    """A data set folder with these files, by default with the same test file as train file."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in (("train", train), ("test", train if test is None else test)):
        (folder / f"{split}.{ending}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def labels(dataset: str, split: str = "train") -> list[int]:
    return [label for _, label in pairs_of(load_questions(dataset, split))]


def fault(dataset: str, split: str = "train") -> str:
    """The one line in which reading it ends."""
    with pytest.raises(UserError) as error:
        load_questions(dataset, split)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------- fingerprints
def save_weights(folder: Path, content: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return str(folder)


def test_weights_are_told_by_their_bytes(tmp_path):
    """A copy of another date and place is the same; one other byte, also in the middle of a file, is not."""
    first = fingerprint_weights(save_weights(tmp_path / "a", bytes(3_000_000)))
    copy = Path(save_weights(tmp_path / "b[1]", bytes(3_000_000)))
    os.utime(copy / "model.safetensors", (0, 0))
    assert fingerprint_weights(str(copy)) == first
    changed = bytearray(3_000_000)
    changed[1_234_567] = 1
    assert fingerprint_weights(save_weights(tmp_path / "a", bytes(changed))) != first
    assert fingerprint_weights("Qwen/Qwen2.5-0.5B") is None and fingerprint_weights("") is None


def test_an_adapter_is_its_base_too(tmp_path):
    """The same adapter on other base weights is another model; an unreadable one ends in one line."""
    base, adapter = save_weights(tmp_path / "base", b"1"), save_weights(tmp_path / "adapter", b"2")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": base}))
    first = fingerprint_weights(adapter)
    save_weights(tmp_path / "base", b"3")
    assert fingerprint_weights(adapter) != first
    config.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        fingerprint_weights(adapter)


def test_rows_are_told_by_their_content():
    """The number of rows is readable, order and labels count."""
    pairs = [("a", 1), ("b", 2)]
    assert fingerprint_rows(pairs).startswith("2 rows, sha256 ")
    others = [pairs[::-1], [("a", 1), ("b", 3)], pairs[:1]]
    assert len({fingerprint_rows(rows) for rows in [pairs, *others]}) == 4


# ----------------------------------------------------------------------------------------------- where work continues
def test_samples_belong_to_weights(tmp_path, monkeypatch):
    """make_traces.py goes on with samples of the same weights, copied or not recorded before, and refuses others."""
    data = write_data(tmp_path / "data", *range(3))
    model, log = save_weights(tmp_path / "model", b"old"), tmp_path / "out" / "questions.jsonl"
    boxer = Boxer()
    monkeypatch.setattr(make_traces, "load_sampler", lambda *_: (boxer, Letters()))
    flags = ["--free", "--cpu", "--model", model, "--dataset", data, "--output", str(tmp_path / "out")]
    make_traces.main([*flags, "--questions", ":1"])
    os.utime(Path(model, "model.safetensors"), (0, 0))
    make_traces.main([*flags, "--questions", ":2"])
    sampled = log.read_bytes()

    save_weights(tmp_path / "model", b"new")
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(UserError, match="drawn with weights '1 files, .*--output"):
            make_traces.main(flags)
    assert log.read_bytes() == sampled
    Path(model, "model.safetensors").rename(tmp_path / "away")  # judging anew needs no model, and forgets no weights
    make_traces.main([*flags, "--questions", ":2"])
    save_weights(tmp_path / "model", b"new")
    with pytest.raises(UserError, match="drawn with weights"):
        make_traces.main(flags)

    settings = json.loads((tmp_path / "out/settings.json").read_text())
    del settings["weights"]  # as older versions wrote it
    (tmp_path / "out/settings.json").write_text(json.dumps(settings))
    make_traces.main(flags)
    assert boxer.drawn > 3 * make_traces.SAMPLES


@pytest.fixture(scope="module")
def adapter_run(demo_base, tmp_path_factory):
    """A run of one step with LoRA on a few questions, one of them in the test split too; and what continues it."""
    folder = tmp_path_factory.mktemp("adapter")
    shutil.copytree(demo_base / "model", folder / "model")
    data = load_from_disk(demo_base / "data")
    train, test = ([to_row(*pair) for pair in zip(*data[split][:12].values(), strict=True)] for split in data)
    test = test[:6]
    make(folder / "data", lines([test[0], *train]), lines(test))  # the last two of train are development questions
    files = ["--model", folder / "model", "--dataset", folder / "data", "--output", folder / "run"]
    constants = SMALL | {"USE_LORA": True, "COMPLETIONS_PER_QUESTION": 2, "MICRO_BATCH": 4, "DEV_QUESTIONS": 2}

    def go_on(steps: int, *flags: str) -> None:
        run_main(train_grpo.main, "--cpu", *files, "--max-steps", steps, *flags, **constants)

    go_on(1)
    return SimpleNamespace(folder=folder, train=train, test=test, go_on=go_on)


def test_a_resumed_adapter_needs_its_base(adapter_run):
    """Other weights in MODEL's folder are refused before a step is made: the adapter was not trained on them."""
    weights = adapter_run.folder / "model" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + bytes(4))
    try:
        with pytest.raises(UserError, match="MODEL_READ was .*the adapter saved in .* belongs to the old weights"):
            adapter_run.go_on(2, "--resume")
    finally:
        weights.write_bytes(kept)


def test_before_and_after_ask_the_same(adapter_run):
    """A test split that changed is refused on resume, since `before` would stand beside an `after` of others."""
    data = adapter_run.folder / "data"
    (data / "test.jsonl").write_text(lines(adapter_run.test[:-1]))
    with pytest.raises(UserError, match="TEST_READ was '6 rows, .* and is '5 rows, .* was measured on other questions"):
        adapter_run.go_on(2, "--resume")
    (data / "test.jsonl").write_text(lines(adapter_run.test))


def test_other_training_rows_are_named(adapter_run, capsys):
    """A changed train split is named like a changed constant and recorded, test questions fall out of it, aloud."""
    (adapter_run.folder / "data" / "train.jsonl").write_text(lines([adapter_run.test[0], *adapter_run.train[1:]]))
    adapter_run.go_on(2, "--resume")
    said = capsys.readouterr().out
    assert "note: from checkpoint-1 on TRAIN_READ is '9 rows, " in said and "no longer '10 rows, " in said
    assert "1 training questions dropped that are in the test split too" in said
    assert not any(f"{name}_READ is" in said for name in ("MODEL", "DEV", "TEST"))
    recipe = json.loads((adapter_run.folder / "run/recipe/recipe.json").read_text())
    assert [recipe[f"{name}_READ"].split(",")[0] for name in ("TRAIN", "DEV", "TEST")] == ["9 rows", "2 rows", "6 rows"]
    assert recipe["MODEL_READ"] == fingerprint_weights(str(adapter_run.folder / "model"))


def test_other_development_questions_are_named(adapter_run, capsys):
    """Changed development questions, which the best checkpoint is chosen by, are named and do not end the run."""
    rows = [adapter_run.test[0], *adapter_run.train[1:-1], to_row("7加8等于几？", 15)]
    (adapter_run.folder / "data" / "train.jsonl").write_text(lines(rows))
    adapter_run.go_on(3, "--resume")
    assert "note: from checkpoint-2 on DEV_READ is '2 rows, " in capsys.readouterr().out


def test_sft_measures_the_same_too(demo_base, tmp_path):
    """train_sft.py refuses another test split on resume as train_grpo.py does."""
    data = load_from_disk(demo_base / "data")
    train, test = ([to_row(*pair) for pair in zip(*data[split][:10].values(), strict=True)] for split in data)
    make(tmp_path / "data", lines(train), lines(test[:6]))
    traces = [
        {"prompt": [{"role": "user", "content": f"{i}+1="}]}
        | {"completion": [{"role": "assistant", "content": to_trace("想一想", i + 1)}]}
        for i in range(4)
    ]
    (tmp_path / "traces.jsonl").write_text(lines(traces))
    flags = ["--cpu", "--model", demo_base / "model", "--dataset", tmp_path / "data"]
    flags += ["--traces", tmp_path / "traces.jsonl", "--output", tmp_path / "run"]
    constants = {name: value for name, value in SMALL.items() if name in train_sft.default_recipe()}
    constants |= {"ROWS_PER_STEP": 2, "MICRO_BATCH": 2, "DEV_QUESTIONS": 2}
    run_main(train_sft.main, *flags, "--max-steps", 1, **constants)
    for folder in ("run", "run/checkpoint-1"):  # and what it saves answers with as many tokens as it was measured with
        saved = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert saved["max_new_tokens"] == SMALL["MAX_COMPLETION_TOKENS"]
    make(tmp_path / "data", lines(train), lines(test[:4]))
    with pytest.raises(UserError, match="TEST_READ was '6 rows, .* and is '4 rows"):
        run_main(train_sft.main, *flags, "--max-steps", 2, "--resume", **constants)


@pytest.mark.parametrize("lora", [True, False])
def test_what_fits_and_what_does_not(lora, tmp_path):
    """A checkpoint of all weights goes on with another MODEL folder, an adapter does not; runs without fingerprints,
    and constants that are looked at before the inputs are read, differ in none."""
    recipe = train_grpo.default_recipe() | {"OUTPUT_DIR": str(tmp_path), "USE_LORA": lora}
    begun = SimpleNamespace(**recipe, MODEL_READ="1 files, sha256 a", TEST_READ="4 rows, sha256 b")
    checkpoints.save_recipe(tmp_path, begun)
    assert checkpoints.refuse_incompatible(tmp_path, SimpleNamespace(**recipe)) == {}
    now = SimpleNamespace(**recipe, MODEL_READ="1 files, sha256 c", TEST_READ="4 rows, sha256 b")
    if lora:
        with pytest.raises(UserError, match="MODEL_READ"):
            checkpoints.refuse_incompatible(tmp_path, now)
    else:
        assert list(checkpoints.refuse_incompatible(tmp_path, now)) == ["MODEL_READ"]
    checkpoints.save_recipe(tmp_path, SimpleNamespace(**recipe))
    assert checkpoints.refuse_incompatible(tmp_path, now) == {}


def test_test_questions_are_not_learned(tmp_path, capsys):
    """What the test split asks falls out of the training questions; where nothing is left, that is refused."""
    data = make(tmp_path, lines([*ROWS[8:10], *ROWS[:8]]), lines(ROWS[8:]))
    assert [label for _, label in pairs_of(load_splits(data, 1)[0])] == list(range(7))
    assert "2 training questions dropped" in capsys.readouterr().out
    data = make(tmp_path, lines(ROWS[:10]), lines(ROWS[10:]))
    train, dev, _ = load_splits(data, 2)
    assert [label for rows in (train, dev) for _, label in pairs_of(rows)] == list(range(10))
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="has 0 training questions that are in no other split"):
        load_splits(make(tmp_path, lines(ROWS)), 2)


# ------------------------------------------------------------------------------------------------- folders and files
@pytest.mark.parametrize("name", ["json", "csv", "text", "parquet", "imagefolder", "brackets[1]", "st*r", "新 [数据]"])
def test_a_folder_is_read_whatever_its_name(name, tmp_path, monkeypatch):
    """Readers of that name, patterns that match it or its neighbours: the folder's own files are read, no others."""
    for each in (name, "brackets1", "star", "zzz"):
        make(tmp_path / each, lines(ROWS[:1] if each == name else ROWS[5:]), lines(ROWS[1:3] if each == name else ROWS))
    monkeypatch.chdir(tmp_path)
    for given in (name, f"{name}/", str(tmp_path / name)):
        assert labels(given) == [0] and labels(given, "test") == [1, 2]


def test_a_missing_file_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no file 'no.jsonl'" in fault("no.jsonl")


def test_a_hub_id_names_the_mirror(tmp_path, monkeypatch):
    """What can only be on the hub ends, without a network, in the line that names the way there."""
    monkeypatch.chdir(tmp_path)
    assert "(hub id): ConnectionError" in fault("no-such/data") and "HF_ENDPOINT=" in fault("no-such/data")


def write_file(path: Path, rows: list[dict]) -> str:
    data = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".csv":
        data.to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(lines(rows))
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_a_single_file_is_a_data_set(ending, tmp_path, capsys):
    """Its last tenth is the test split and the rest is train, which is said."""
    file = write_file(tmp_path / f"my[1]{ending}", ROWS)
    assert labels(file) == list(range(18)) and labels(file, "test") == [18, 19]
    assert "its last 2 rows are the test split" in capsys.readouterr().out
    assert "no split 'validation'" in fault(file, "validation")


def test_other_files_are_no_data_sets(tmp_path):
    """The endings that are read are named."""
    (tmp_path / "json").write_text(lines(ROWS))
    assert "no .jsonl, .json, .csv, .parquet file" in fault(str(tmp_path / "json"))


def test_changed_rows_of_the_same_date_are_read(tmp_path):
    """Files out of archives that give all of them one date are read by what they hold, not from an earlier reading."""
    for label in (1, 2):
        make(tmp_path, lines([to_row("几个？", label)]))
        os.utime(tmp_path / "train.jsonl", (0, 0))
        os.utime(tmp_path / "test.jsonl", (0, 0))
        assert labels(str(tmp_path)) == [label]


def configurations(folder: Path, *names: str) -> str:
    """A folder whose README.md says which configurations there are."""
    said = [f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.jsonl\n" for name in names]
    for label, name in enumerate(names):
        make(folder / name, lines(ROWS[label : label + 1]))
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(said) + "---\n")
    return str(folder)


def test_of_several_configurations_main_is_read(tmp_path, capsys):
    """As in openai/gsm8k: `main` is taken and said; without it they are named, and how to choose."""
    assert labels(configurations(tmp_path / "two", "socratic", "main")) == [1]
    assert "has the configurations socratic, main: 'main' is read" in capsys.readouterr().out
    said = fault(configurations(tmp_path / "none", "easy", "hard"))
    assert "'main' not found" in said and "easy" in said and "hard" in said


# ---------------------------------------------------------------------------------------------- what is wrong in them
HEAD = f"{QUESTION_COLUMN},{ANSWER_COLUMN}\n"


@pytest.mark.parametrize(
    ("ending", "train", "test", "words"),
    [
        ("jsonl", lines(ROWS).encode("gbk"), lines(ROWS), ["train.jsonl: it is not UTF-8"]),
        ("jsonl", lines(ROWS).encode("utf-16"), lines(ROWS), ["train.jsonl: it is not UTF-8"]),
        ("csv", (HEAD + "小明,1\n").encode("gbk"), HEAD + "小明,1\n", ["train.csv: it is not UTF-8"]),
        ("csv", HEAD + "小明,1\n", (HEAD + "小明,1\n").encode("gbk"), ["test.csv: it is not UTF-8"]),
        (
            "jsonl",
            lines(ROWS),
            '{"题": "几个", "答": 1}\n',
            ["column names don't match", "题", QUESTION_COLUMN],
        ),
        ("jsonl", lines(ROWS), lines([{**ROWS[0], ANSWER_COLUMN: 1.5}]), ["1.5", "int64"]),
        (
            "csv",
            f"\ufeff{HEAD.replace(',', ', ')}小明,1\n",
            HEAD + "小明,1\n",
            ["column names don't match", f"' {ANSWER_COLUMN}'"],
        ),
        ("jsonl", lines(ROWS) + '{"a": \n', lines(ROWS), ["train.jsonl: ", "JSON parse error", "row 20"]),
        ("csv", HEAD + '"小明,1\n', HEAD + "小明,1\n", ["train.csv: ", "EOF inside string"]),
        ("parquet", b"PAR1", b"PAR1", [".parquet: ", "Parquet"]),
    ],
)
def test_the_cause_is_said(ending, train, test, words, tmp_path, capfd):
    """One line names the file and what is wrong with it, not that a data set could not be generated; no log beside."""
    said = fault(make(tmp_path / "data", train, test, ending))
    assert all(word in said for word in words) and "while generating" not in said and "HF_ENDPOINT" not in said
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("csv", f"\ufeff{QUESTION_COLUMN} , {ANSWER_COLUMN}\n小明, 7\n"),
        ("csv", f'\ufeff" {QUESTION_COLUMN}","\ufeff{ANSWER_COLUMN}"\n"小明","7"\n'),
        ("jsonl", "\ufeff" + lines([to_row("小明", 7)])),
        ("jsonl", lines([{f"\ufeff{QUESTION_COLUMN}": "小明", f"{ANSWER_COLUMN}\u3000": 7}])),
    ],
)
def test_blanks_and_marks_around_names(ending, text, tmp_path):
    """A byte order mark and blanks around the names of columns, as spreadsheets leave them, do not matter."""
    assert pairs_of(load_questions(make(tmp_path, text, ending=ending), "train")) == [("小明", 7)]
