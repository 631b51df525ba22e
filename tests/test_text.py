"""Text and files as people have them: other encodings, foreign files, closed streams, folders that are read-only."""

import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import chat
import evaluate as evaluate_script
import make_traces
from engine import checkpoints, console, curves, models
from engine.console import UserError
from engine.templates import trained_recipe
from engine.traces import from_conversation, read_rows


# ---------------------------------------------------------------------------------------------------------- encodings
@pytest.mark.parametrize(
    ("encoding", "bad", "skipped"), [("utf-8", "六小时".encode("gbk"), "UTF-8"), ("gbk", b"\xff\xff", "GBK")]
)
def test_chat_skips_a_line_that_is_no_text(demo_base, monkeypatch, capsys, encoding, bad, skipped):
    """A line in another encoding is named and skipped, the others are answered, also one behind a byte order mark."""
    asked, plain_encode = [], chat.encode

    def encode(tokenizer, conversations):
        asked.append(conversations[0][-1]["content"])
        return plain_encode(tokenizer, conversations)

    monkeypatch.setattr(chat, "encode", encode)
    monkeypatch.setattr(chat, "MAX_TOKENS", 2)
    first = ("\ufeff" if encoding == "utf-8" else "") + "5分钟多少秒\n"
    typed = b"".join((first.encode(encoding), b"\n", bad, b"\n", "6小时多少分钟\nexit\n".encode(encoding)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding))
    monkeypatch.setattr(sys, "argv", ["chat.py", str(demo_base / "model"), "--cpu"])
    chat.main()
    assert asked == ["5分钟多少秒", "6小时多少分钟"]
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"skipped, for it is not {skipped}: ")


def conversation(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": answer}]}


def test_half_a_surrogate_pair_costs_its_line(tmp_path, capsys):
    """A text that no tokenizer takes is dropped with a note, before the model is loaded; the other lines are kept."""
    rows = [conversation(answer) for answer in ("好", "\ud83d", "\U0001f600", "\udc00")]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(str(tmp_path / "chat.jsonl"), "--mix", from_conversation)
    assert [row["completion"][0]["content"] for row in read] == ["好", "\U0001f600"]
    said = "note: --mix: 2 lines dropped that hold half a surrogate pair, the first is line 2\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("flag", ["--traces", "--mix"])
def test_encoding_of_a_file(tmp_path, flag):
    """A byte order mark is taken; a file in GBK is named, with the encoding that it should have."""
    file, line = tmp_path / "rows.jsonl", json.dumps(conversation("好"), ensure_ascii=False)
    file.write_text(line, encoding="utf-8-sig")
    assert len(read_rows(str(file), flag, from_conversation)) == 1
    file.write_text(line, encoding="gbk")
    with pytest.raises(UserError, match=f"^{flag} .*rows.jsonl' is not UTF-8: .*; save it as UTF-8$"):
        read_rows(str(file), flag, from_conversation)


# ----------------------------------------------------------------------------------------------------------- adapters
@pytest.fixture(scope="module")
def adapter(demo_base, tmp_path_factory) -> Path:
    """An adapter as peft saves it: without a tokenizer."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model, _ = models.load_model(str(demo_base / "model"))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_adapter_without_a_tokenizer(adapter):
    """What is missing is the tokenizer, and the message says so."""
    with pytest.raises(UserError, match=f"{adapter}' .folder.: its tokenizer is missing or damaged: .*Put all its"):
        models.load_model(str(adapter))


@pytest.mark.parametrize("base", ["./base/model", "base/model", "base"])
def test_adapter_whose_base_is_not_here(adapter, tmp_path, monkeypatch, base):
    """The message names the base model, the folder in which it is looked for, and where its path is written."""
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    monkeypatch.chdir(tmp_path)
    words = f"{copy}' .adapter of '{base}', no folder in '{tmp_path}'.*Mend base_model_name_or_path in its adapter_conf"
    with pytest.raises(UserError, match=words):
        models.load_model(str(copy))


# ------------------------------------------------------------------------------------------------------ foreign files
FOREIGN = {
    "a list": b"[1, 2]",
    "a number": b"5",
    "other keys": b'{"dataset": "squad", "acc": 0.5}',
    "half a file": b'{"SYSTEM_PROMPT": "abc", "DATA',
    "binary": b"\x89PNG\r\n\xff\x00",
    "empty": b"",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_recipe_beside_a_model(tmp_path, capsys, what):
    """Somebody else's recipe.json, or half of one, is passed over with a note, and ours above it is found."""
    model, name = tmp_path / "run" / "checkpoint-1", "recipe/recipe.json"
    for folder, content in ((model, FOREIGN[what]), (model.parent, b'{"DATASET": "ours"}')):
        (folder / "recipe").mkdir(parents=True)
        (folder / name).write_bytes(content)
    assert trained_recipe(str(model)) == {"DATASET": "ours"}
    assert capsys.readouterr().out.startswith(f"note: '{model / name}' is ignored: ")
    (model.parent / name).unlink()
    assert trained_recipe(str(model)) == {}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_in_a_runs_folder(tmp_path, what):
    """Where a run writes, a file of that name that no run wrote is an error: it would be believed or overwritten."""
    (tmp_path / "results.json").write_bytes(FOREIGN[what])
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "recipe.json").write_bytes(FOREIGN[what])
    recipe = SimpleNamespace(OUTPUT_DIR=str(tmp_path))
    for name, read in (
        ("results.json", lambda: checkpoints.find(tmp_path, recipe, resume=False)),
        ("recipe.json", lambda: checkpoints.changed_constants(tmp_path, recipe)),
    ):
        with pytest.raises(UserError, match=f"{name}'.* name another --output$"):
            read()


@pytest.mark.parametrize(("script", "reads"), [(evaluate_script, "load_questions"), (make_traces, "load_splits")])
def test_data_set_of_a_model(demo_base, tmp_path, monkeypatch, script, reads):
    """The data set is the one of the model's recipe; a results.json of another program, beside it, is not believed."""
    model = Path(shutil.copytree(demo_base / "model", tmp_path / "model"))
    (model / "recipe").mkdir()
    (model / "recipe" / "recipe.json").write_text(json.dumps({"DATASET": "owner/questions"}))
    (model / "results.json").write_text('{"dataset": "squad", "exact_match": 0.5}')

    def read(dataset, *_):
        raise UserError(f"asked for {dataset}")

    monkeypatch.setattr(script, reads, read)
    named = [str(model)] if script is evaluate_script else ["--model", str(model)]
    with pytest.raises(UserError, match="^asked for owner/questions$"):
        script.main([*named, "--output", str(tmp_path / "out"), "--cpu"])


# ------------------------------------------------------------------------------------------------- streams and folders
def test_closed_streams():
    """With stdin, stdout and stderr closed a script runs: it reads an empty input, and what it says is lost."""
    code = (
        "import sys; from engine.console import run\n"
        "def main():\n"
        "    print('said'); print('said', file=sys.stderr); sys.exit(7 if sys.stdin.read() == '' else 1)\n"
        "run(main)"
    )
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code], cwd=ROOT)
    assert done.returncode == 7


def test_picture_that_cannot_be_written(tmp_path, monkeypatch):
    """A picture that cannot be written is one line with its name."""
    (tmp_path / "curves.png").mkdir()
    monkeypatch.setattr(curves, "read_history", lambda _: HISTORY)
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path)])
    with pytest.raises(UserError, match=f"^cannot write '{tmp_path}/curves.png': .*; mend that"):
        curves.main()


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Where the hub's cache is read-only, one line names HF_HOME and what to do, whatever library met it."""
    from transformers import AutoModelForCausalLM

    def denied(name, **_):
        try:
            raise PermissionError(13, "Permission denied", str(tmp_path / "cache" / "hub"))
        except PermissionError as error:  # as transformers does
            raise OSError(f"PermissionError when downloading {name}") from error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", denied)
    for home, words in (("cache", "set HF_HOME to a folder that can be written"), ("elsewhere", "set HF_ENDPOINT=")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / home))
        with pytest.raises(SystemExit, match="2"):
            console.run(lambda: models.load_model("owner/model"))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line and ("'cache'" not in home or str(tmp_path) in line)


# ---------------------------------------------------------------------------------------------------- names in pictures
HISTORY = [{"step": step, "reward/total": step / 10} for step in range(3)]


LAST_RESORT = "Last Resort"  # it comes with matplotlib, and has a box with a number for every character there is


def labels(monkeypatch, tmp_path, *names: str) -> list[str]:
    """What a picture of runs with these names calls them; a warning, of a missing glyph say, is an error."""
    used, draw = [], curves.draw_curve

    def draw_curve(axes, history, tag, color, label):
        used.append(label)
        draw(axes, history, tag, color, label)

    monkeypatch.setattr(curves, "draw_curve", draw_curve)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves.draw_curves(dict.fromkeys(names, HISTORY), tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    return list(dict.fromkeys(used))


def test_chinese_names_with_a_font(monkeypatch, tmp_path, capsys):
    """Where a font has the characters it is used, and the picture shows the names; a $ is a $."""
    monkeypatch.setattr(curves, "CHINESE", LAST_RESORT, raising=False)
    assert labels(monkeypatch, tmp_path, "output/第一次", "费用$\\frac{") == ["output/第一次", "费用$\\frac{"]
    assert not capsys.readouterr().out


def test_names_without_a_font(monkeypatch, tmp_path, capsys):
    """Where no font has the characters the picture says run 1 and run 2, and a note says which name is which."""
    monkeypatch.setattr(curves, "CHINESE", "no such font", raising=False)
    assert labels(monkeypatch, tmp_path, "第一次", "second") == ["run 1", "run 2"]
    said = capsys.readouterr().out
    assert said.startswith("note: no font") and said.endswith("run 1 is '第一次', run 2 is 'second'\n")
    assert labels(monkeypatch, tmp_path, "first", "zweitgrößte") == ["first", "zweitgrößte"]
    assert not capsys.readouterr().out


def test_font_installed_since(monkeypatch, tmp_path):
    """matplotlib keeps a list of the fonts that it once found; one installed since is found all the same."""
    from matplotlib import font_manager

    known = font_manager.fontManager.ttflist
    (new,) = (font for font in known if font.name.startswith(LAST_RESORT))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in known if font is not new])
    (tmp_path / "torn.ttf").write_bytes(b"no font")
    files = [str(tmp_path / "torn.ttf"), shutil.copy(new.fname, tmp_path)]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    monkeypatch.setattr(curves, "CHINESE", LAST_RESORT, raising=False)
    assert curves.find_fonts("中文") == [curves.LATIN, new.name]
