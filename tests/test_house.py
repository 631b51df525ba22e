"""The plan of the house, asserted from the sources: who may import whom, and what stands in one place only."""

import ast

import pytest
from conftest import ROOT

VERBS = {"train_r1", "train_grpo", "train_sft", "make_traces", "evaluate", "chat"}  # what a person runs
EDITED = {"rewards", "prompts"}  # what a person edits
FILES = [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")]
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
SOURCES = {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in NAMES.items()}


def imported(name: str) -> set[str]:
    """The modules that a file imports anywhere, also inside of functions; of the engine's each by its own name."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "engine":
            names = [f"engine.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        found |= {each if each in SOURCES else each.split(".")[0] for each in names}
    return found


IMPORTS = {name: imported(name) & set(SOURCES) for name in SOURCES}


def reachable(name: str) -> set[str]:
    """All that a file imports, directly or through others."""
    found, todo = set(), [name]
    while todo:
        new = IMPORTS[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_what_is_run_and_edited_lies_on_top():
    """The top holds the scripts and what a person edits, and nothing else; the rules below meet a full house."""
    assert {name for name in SOURCES if not name.startswith("engine")} == VERBS | EDITED
    assert all(IMPORTS[verb] for verb in VERBS)


@pytest.mark.parametrize("name", SOURCES)
def test_no_circle(name):
    """No file imports itself by way of others."""
    assert name not in reachable(name)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - VERBS))
def test_the_engine_imports_no_verb(name):
    """The engine needs from the top only rewards.py and prompts.py, also through others."""
    assert not reachable(name) & VERBS


@pytest.mark.parametrize("name", sorted(VERBS - {"train_r1"}))
def test_verbs_import_the_engine(name):
    """A script needs no other script but train_grpo, for its constants; train_r1 runs them all."""
    assert IMPORTS[name] & VERBS <= ({"train_grpo"} - {name})


def test_what_is_edited_stands_alone():
    """prompts.py imports nothing, rewards.py only the engine's reading of numbers."""
    assert IMPORTS["prompts"] == set() and imported("prompts") == set()
    assert IMPORTS["rewards"] == {"engine.numbers"}


@pytest.mark.parametrize("name", ["engine.console", "engine.numbers", "prompts", "rewards"])
def test_these_know_no_torch(name):
    """Text and words need no second to start: neither they nor what they import know torch."""
    heavy = {"torch", "transformers", "trl", "accelerate", "peft"}
    assert not any(imported(part) & heavy for part in {name, *reachable(name)})


def test_one_place_each():
    """GRPOConfig's names, the template of prompts and the decode loop are each known to one file."""
    text = {name: path.read_text(encoding="utf-8") for path, name in NAMES.items()}
    assert [name for name in text if "GRPOConfig(" in text[name]] == ["train_grpo"]
    assert [name for name in text if "apply_chat_template(" in text[name]] == ["engine.templates"]
    assert {name for name in text if ".logits" in text[name]} == {"engine.rollout", "engine.preference"}


@pytest.mark.parametrize("name", ["train_grpo", "train_sft"])
def test_main_is_short(name):
    """The heart is read in one go: under 90 lines, with one import site and nothing that assigns across a closure."""
    [main] = [n for n in SOURCES[name].body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert main.end_lineno - main.lineno + 1 < 90
    places = [i for i, node in enumerate(main.body) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert places == list(range(places[0], places[0] + len(places)))
    assert len(places) == sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(main))
    assert not [node for node in ast.walk(main) if isinstance(node, ast.FunctionDef) and node is not main]


@pytest.mark.parametrize(("name", "becomes"), [("train_grpo", "grpo_config"), ("train_sft", "sft_config")])
def test_constants_stand_above_what_they_become(name, becomes):
    """TRL's config is the first function below the constants."""
    functions = [node.name for node in SOURCES[name].body if isinstance(node, ast.FunctionDef)]
    assert functions[0] == becomes
