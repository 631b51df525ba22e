"""The plan of the house, asserted from the sources: who may import whom, and what stands in one place only."""

import ast

import pytest
from conftest import ROOT

VERBS = {"train_grpo", "train_sft", "make_traces", "evaluate", "chat", "draw_curves"}  # what a person runs
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}


def imported(name: str) -> set[str]:
    """The modules that a file imports anywhere, also inside of functions."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
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


def test_every_verb_is_there():
    """The rules below would hold for an empty house too."""
    assert VERBS < set(SOURCES) and all(IMPORTS[verb] for verb in VERBS)


@pytest.mark.parametrize("name", SOURCES)
def test_no_circle(name):
    """No file imports itself by way of others."""
    assert name not in reachable(name)


@pytest.mark.parametrize("name", set(SOURCES) - VERBS)
def test_no_noun_imports_a_verb(name):
    """What is used never needs what a person runs, nor does it through others."""
    assert not reachable(name) & VERBS


@pytest.mark.parametrize("name", VERBS)
def test_verbs_import_nouns(name):
    """A verb needs no other verb but train_grpo, for its constants; those that train draw curves."""
    allowed = {"train_grpo": {"draw_curves"}, "train_sft": {"train_grpo", "draw_curves"}, "draw_curves": set()}
    assert IMPORTS[name] & VERBS <= allowed.get(name, {"train_grpo"})


@pytest.mark.parametrize("name", ["console", "prompts", "rewards"])
def test_these_know_no_torch(name):
    """Text and words need no second to start: neither they nor what they import know torch."""
    heavy = {"torch", "transformers", "trl", "accelerate", "peft"}
    assert not any(imported(part) & heavy for part in {name, *reachable(name)})


def test_one_place_each():
    """GRPOConfig's names, the template of prompts and the decode loop are each known to one file."""
    text = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES}
    assert [name for name in text if "GRPOConfig(" in text[name]] == ["train_grpo"]
    assert [name for name in text if "apply_chat_template(" in text[name]] == ["models"]
    assert {name for name in text if ".logits" in text[name]} == {"rollout", "preference"}  # tokens, and a score


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
