"""The commands of the READMEs and of docs/ can be typed: every file, flag and constant that they name exists."""

import re
import shlex

import pytest
from conftest import ROOT, run_script

import train_grpo

PAGES = {page: page.read_text(encoding="utf-8") for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]}
README = "\n".join(text for page, text in PAGES.items() if page.name != "notebook.md")  # its commands are of their time
BLOCKS = re.findall(r"^```(?:bash|sh)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = sorted({line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if ".py" in line})


def test_there_are_commands():
    """The pattern above finds them: without that, the tests below would prove nothing."""
    for script in ("train_grpo.py", "evaluate.py", "chat.py", "studies/demo_base.py"):
        assert any(script in command for command in COMMANDS), script
    assert "pip install -r requirements.txt && python train_grpo.py --demo" in README
    assert "pip install -r requirements.txt && python -m pytest" in README


@pytest.fixture(scope="module")
def help_of():
    """The help text of a script, asked once."""
    texts: dict[str, str] = {}

    def ask(script: str) -> str:
        if script not in texts:
            texts[script] = run_script(script, "--help").stdout
        return texts[script]

    return ask


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command, help_of):
    """Every script of a command exists and knows every flag given to it."""
    for part in re.split(r"&&|\||;", command):
        words = shlex.split(part)
        scripts = [word for word in words if word.endswith(".py")]
        for script in scripts:
            assert (ROOT / script).is_file(), f"{script} in {command!r}"
            # of the studies, which need seconds to start, the source is read
            known = (ROOT / script).read_text(encoding="utf-8") if "/" in script else help_of(script)
            for flag in (word for word in words[words.index(script) :] if word.startswith("--")):
                assert re.search(rf"{flag}\b", known), f"{flag} in {command!r}"


def test_constants_exist():
    """A constant that the README names in capitals is one of a script's, prompts.py's or rewards.py's."""
    import make_traces
    import prompts
    import rewards
    import train_r1
    import train_sft

    modules = (train_grpo, train_sft, train_r1, make_traces, prompts, rewards)
    known = {name for module in modules for name in vars(module) if name.isupper()}
    named = set(re.findall(r"`([A-Z][A-Z]+_[A-Z_]+)\b", README))
    environment = {"HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
    assert named <= known | environment, named - known - environment


def test_files_exist():
    """Pictures, files and headings that a page links to are in the repository."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), f"{target} in {page.name}"
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{target} in {page.name}"


def test_twins():
    """The Chinese README is the English one: the same commands, outputs, links, and the same names in the tables."""
    english, chinese = (PAGES[ROOT / name] for name in ("README.md", "README.zh.md"))
    assert commands(english) and commands(english) == commands(chinese)
    for pattern in (r"^```text\n.*?^```", r"\]\([^)]+\.(?:md|png)[^)]*\)", r"^\| (`[^|]+`) \|"):
        found = [sorted(re.findall(pattern, text, flags=re.M | re.S)) for text in (english, chinese)]
        found[1] = sorted(link.replace(".zh.", ".") for link in found[1])
        assert {*found[0]} and {*found[0]} ^ {*found[1]} <= {"](README.zh.md)", "](README.md)"}


@pytest.mark.parametrize(("page", "limit"), [("README.md", 10_500), ("README.zh.md", 9_000)])
def test_a_readme_is_read(page, limit):
    """It stays short, in characters and in every line of prose."""
    text = PAGES[ROOT / page]
    assert len(text) <= limit
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines()
    assert [line for line in prose if len(line) > 240 and not line.startswith(("|", "!["))] == []


def test_every_file_on_top_is_named():
    """The table of files names all that a person runs or edits, and engine/ in one line."""
    table = PAGES[ROOT / "README.md"].split("| file | what it is |")[1].split("\n\n")[0]
    named = re.findall(r"`([\w/]+(?:\.py)?)`", table)
    assert {name for name in named if name.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}
    assert "engine/" in named


def commands(text: str) -> set[str]:
    """The lines of the shell blocks, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    lines = {re.split(r"(?:^|  )#", line)[0].strip() for block in blocks for line in block.splitlines()}
    return lines - {""}
