"""Chat templates and tokenizers leave our text as it is or are refused, and so are texts longer than a model reads."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from conftest import ROOT, conversation_about
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as backends
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import chat
import evaluate
import make_traces
import train_grpo
import train_sft
from engine import models
from engine.console import UserError
from engine.lora import lora_config
from engine.numbers import TAGS, is_hard_format
from engine.questions import to_prompt
from engine.rollout import PlainSampler, Sampler
from engine.templates import CHATML_TEMPLATE, PLAIN_TEMPLATE, fit_template, own_template, render
from prompts import SYSTEM_PROMPT, WORKED_EXAMPLE

QWEN = ROOT.parent / "shared" / "data" / "qwen2.5_tokenizer"
TRACE = "<think>\n7*8=56\n</think>\n<answer>\n56\n</answer>"
QUESTION = "7个盒子各有8支笔，一共多少支？"
BUNDLED = {path.stem: path.read_text() for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}

# What becomes of TRL's templates; `_training` is theirs for the same model
AS_IT_IS = """
cohere cohere_training cohere2 cohere2_training diffusion_gemma diffusion_gemma_training gemma3 gemma3_training gemma4
gemma4_v2 gemma4_v3 gemma4_v4 gemma4_v5 lfm2 lfm2_training lfm2_v2 lfm2_v2_training llama3 llama3_training llama3_1
llama3_2 phi3 phi3_training phi3_5 phi3_5_training qwen2_5 qwen2_5_training qwen2_5_vl qwen2_5_vl_training
qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_vl qwen3_vl_training
"""
CHATML = """
lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl nemotron_3_5_lightning nemotron_3_5_lightning_training nemotron_3_nano
nemotron_3_nano_training nemotron_3_super nemotron_3_super_training nemotron_3_ultra nemotron_3_ultra_training qwen3
qwen3_training qwen3_5_nothink qwen3_5_nothink_training qwen3_5_think qwen3_5_think_training qwen3_6 qwen3_6_training
qwen3_8 qwen3_8_training
"""
SYSTEM_FIRST = "gemma gemma_training"
BASE = "glm4moe"  # it ends no turn
REFUSED = """
deepseek_r1_distill deepseek_r1_distill_training deepseekv3 deepseekv3_training glm4moe_training gptoss gptoss_training
idefics3 idefics3_training llava_next llava_next_training muse_glimmer muse_glimmer_training smolvlm smolvlm_training
"""
WAYS = {"as it is": AS_IT_IS, "plain ChatML": CHATML, "the system prompt opens": SYSTEM_FIRST}
WAYS |= {"is a base model": BASE, "refused": REFUSED}
WAYS = {name: way for way, names in WAYS.items() for name in names.split()}

# Others, as they behave
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CLOSED = "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
MINIMIND = TURNS + f"{{% if add_generation_prompt %}}{CLOSED}{{% endif %}}"
R1_IN_CHATML = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
TINYLLAMA = (  # no line break behind the header of its prompt
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MISTRAL = (  # no system turn, and a space in front of an answer that the prompt has not
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
DROPS_SYSTEM = TURNS.replace("+ m['content'] +", "+ (m['content'] if m['role'] != 'system' else '') +").replace(
    "im_", ""
)
DROPS_SYSTEM += "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
UPPER = "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}"


def make_tokenizer(template: str, special: tuple[str, ...] = (), **named: object) -> PreTrainedTokenizerFast:
    """A token for every byte, and what stands in angle brackets in a template as special ones, each of which ends."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(backends.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = {token for token in re.findall(r"<[|｜]?[\w▁]+[|｜]?>", template) if "think" not in token}
    special = ("<s>", "<pad>", "<|im_start|>", "<|im_end|>", *sorted(found), *special)
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer.add_special_tokens([*dict.fromkeys(special)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **tokens | named)


ENDS = (
    "<|im_end|> <|END_OF_TURN_TOKEN|> <|END_RESPONSE|> <｜end▁of▁sentence｜> <turn|> <end_of_turn> <|user|> <|return|> "
    "<|eot_id|> <|eot|> <|end|> <end_of_utterance>"
).split()


def ends_of(tokenizer) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(end) for end in ENDS if end in tokenizer.get_vocab()}


SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"num_hidden_layers": 1, "tie_word_embeddings": True}


def write_model(folder: Path, tokenizer) -> Path:
    """A model with random weights for this tokenizer, of its kind."""
    llama = LlamaConfig, LlamaForCausalLM  # a Qwen2's tokenizer is read as a Qwen2Tokenizer, whatever was saved
    kind, model = (Qwen2Config, Qwen2ForCausalLM) if "Qwen2" in type(tokenizer).__name__ else llama
    ends = {"eos_token_id": [tokenizer.eos_token_id, *ends_of(tokenizer)], "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model(kind(vocab_size=len(tokenizer), **SHAPE, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assert_verbatim(tokenizer, ends: set[int]) -> None:
    """All that the project needs of a template, of the rendered texts and of the tokens; no code of the project's."""
    asked = conversation_about(QUESTION, example=WORKED_EXAMPLE)
    learned = [*asked, {"role": "assistant", "content": TRACE}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(learned, tokenize=False)
    places = [prompt.find(text) for text in (SYSTEM_PROMPT, *(turn["content"] for turn in WORKED_EXAMPLE), QUESTION)]
    assert -1 not in places and places == sorted(places)
    assert prompt.count("think>") == SYSTEM_PROMPT.count("think>") + 2 and "think>" not in prompt.split(QUESTION)[1]
    assert whole.startswith(prompt + TRACE)
    stop = tokenizer(whole.removeprefix(prompt + TRACE), add_special_tokens=False)["input_ids"][0]
    assert stop in ends | {tokenizer.eos_token_id}
    prompt_ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(learned, return_dict=True)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    [learned] = tokenizer.batch_decode([ids[len(prompt_ids) :]], skip_special_tokens=True)
    assert learned.rstrip() == TRACE and is_hard_format(learned.rstrip())


# ---------------------------------------------------------------------------------------------------- chat templates
def settled(template: str, way: str, capsys) -> PreTrainedTokenizerFast | None:
    """A tokenizer after it has met the check, which must have gone that way."""
    tokenizer = make_tokenizer(template)
    if way == "refused":
        with pytest.raises(UserError, match="its chat template|the chat template of .* takes no plain turns") as error:
            fit_template(tokenizer, ends_of(tokenizer), "mine")
        assert "\n" not in str(error.value) and "name another model" in str(error.value)
        return None
    fit_template(tokenizer, ends_of(tokenizer), "mine")
    said = capsys.readouterr().out
    if way == "as it is":
        assert not said and tokenizer.chat_template == template
    else:
        assert way in said and said.startswith("note: 'mine'") and said.count("\n") == 1
    assert_verbatim(tokenizer, ends_of(tokenizer))
    return tokenizer


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name, capsys):
    """Every template that TRL knows is left alone, made right or refused in a line, and in which of these ways."""
    settled(BUNDLED[name], WAYS[name], capsys)


def test_the_list_is_whole():
    """The list above names TRL's templates, each once."""
    assert set(WAYS) == set(BUNDLED)


@pytest.mark.parametrize(
    ("template", "way"),
    [
        (MINIMIND, "plain ChatML"),
        (R1_IN_CHATML, "plain ChatML"),
        (TINYLLAMA, "refused"),
        (MISTRAL, "refused"),
        (DROPS_SYSTEM, "the system prompt opens"),
        (UPPER, "refused"),
        (PLAIN_TEMPLATE, "as it is"),
        (CHATML_TEMPLATE, "as it is"),
    ],
    ids="minimind r1_in_chatml tinyllama mistral drops_system upper plain chatml".split(),
)
def test_others(template, way, capsys):
    """So are templates of kinds that TRL has none of, and our own are left alone."""
    settled(template, way, capsys)


def test_replaced_templates_keep_the_rest(capsys):
    """Nothing changes but what must: the model's own header, begin token and ends are there."""
    turns = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    system = [{"role": "system", "content": "零"}, *turns]
    tokenizer = settled(BUNDLED["gemma"], "the system prompt opens", capsys)
    user, model = "<end_of_turn>\n<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    assert render(tokenizer, system) == f"<s><start_of_turn>user\n零\n\n一{model}二{user}三{model}"
    assert render(tokenizer, turns) == f"<s><start_of_turn>user\n一{model}二{user}三{model}"
    tokenizer = settled(BUNDLED["lfm2_2_5"], "plain ChatML", capsys)
    assert render(tokenizer, turns[:1]) == "<s><|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n"


def test_saved_with_the_model(tmp_path, capsys):
    """The replaced template is what others find in the saved folder, and there it needs no second replacement."""
    folder = write_model(tmp_path / "model", make_tokenizer(BUNDLED["qwen3"]))
    model, tokenizer = models.load_model(str(folder))
    assert "its chat template changes or drops turns; plain ChatML takes its place" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert own_template(again.chat_template) == CHATML_TEMPLATE
    assert_verbatim(again, ends_of(again))
    models.load_model(str(tmp_path / "saved"))
    assert not capsys.readouterr().out


@pytest.mark.skipif(not QWEN.is_dir(), reason="needs the real tokenizer beside the project")
@pytest.mark.parametrize(("name", "way"), [("qwen2_5", "as it is"), ("qwen3", "plain ChatML"), ("", "refused")])
def test_real_tokenizer(name, way, capsys):
    """Qwen's own tokenizer keeps its template to the character, takes ChatML for Qwen3's, and merges no tokens."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    tokenizer.chat_template = BUNDLED.get(name) or MISTRAL.replace("eos_token", "'<|im_end|>'")
    ends, own = {tokenizer.eos_token_id}, tokenizer.chat_template
    if way == "refused":  # ` <` is one token behind an answer, and two behind a prompt
        with pytest.raises(UserError, match="cannot learn our format"):
            fit_template(tokenizer, ends, "mine")
        return
    fit_template(tokenizer, ends, "mine")
    assert (tokenizer.chat_template == own) == (way == "as it is") == (not capsys.readouterr().out)
    assert_verbatim(tokenizer, ends)


def test_a_teacher_is_asked_in_its_own_way(tmp_path, capsys):
    """make_traces.py --free, and nobody else, asks through a template that opens the thinking or that is refused."""
    for name in ("deepseek_r1_distill", "glm4moe_training"):
        folder = write_model(tmp_path / name, make_tokenizer(BUNDLED[name]))
        flags = ["--cpu", "--model", str(folder), "--output", str(tmp_path / "out")]
        constants = {"BF16": False, "MAX_COMPLETION_TOKENS": 4, "SAMPLES": 3}
        flags, recipe = make_traces.configure([*flags, "--free"], constants)
        sampler, tokenizer = make_traces.load_sampler(recipe, flags)
        assert tokenizer.chat_template == BUNDLED[name] and not capsys.readouterr().out
        answers = make_traces.sample(sampler, tokenizer, [make_traces.ask(QUESTION, recipe, flags)], recipe)
        assert len(answers[0]) == 3
        flags.free = False
        with pytest.raises(UserError, match="cannot learn our format: its chat template changes or drops turns"):
            make_traces.load_sampler(recipe, flags)


# -------------------------------------------------------------------------------------------------------------- tags
@pytest.mark.parametrize("kind", ["listed", "named", "qwen2"])
def test_special_tags_are_decoded(kind, demo_base, tmp_path):
    """Tags that come as special tokens keep their ids, are no padding, and are decoded, also by who loads what we save.

    TRL would parse a completion by a response template and take its thinking away: it is dropped.
    """
    names = ("think_token", "end_think_token", "answer_token", "end_answer_token")
    tags = dict(zip(names, TAGS, strict=True)) if kind == "named" else [*TAGS, "<x>"]
    before = make_tokenizer(CHATML_TEMPLATE, (*TAGS, "<x>"), extra_special_tokens=tags)
    if kind == "qwen2":
        before = AutoTokenizer.from_pretrained(demo_base / "model")
        before.add_special_tokens({"extra_special_tokens": [*TAGS, "<x>"]})
    before.response_template, before.pad_token = {"defaults": {"role": "assistant"}}, before.eos_token
    ids = before(TRACE)["input_ids"]
    folder = write_model(tmp_path / "model", before)
    assert "think>" not in AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
    model, tokenizer = models.load_model(str(folder))
    assert model.get_input_embeddings().num_embeddings == len(before) == len(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each(TRACE)["input_ids"] == ids
        assert each.decode([*ids, each.eos_token_id], skip_special_tokens=True) == TRACE
        assert each.decode([*ids, *each("<x>")["input_ids"]], skip_special_tokens=True) == TRACE
        assert each.pad_token not in (*TAGS, each.eos_token) and each.response_template is None
        assert not set(TAGS) & set(each.all_special_tokens)
        assert_verbatim(each, ends_of(each))


def test_a_tokenizer_that_loses_text_is_refused(capsys):
    """Line breaks that do not come back would make every format reward 0: refused, with what came back."""
    tokenizer = make_tokenizer(CHATML_TEMPLATE)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n", " ")])
    with pytest.raises(UserError, match="its tokenizer makes '<think> 5.60=300 </think>"):
        fit_template(tokenizer, ends_of(tokenizer), "mine")


# --------------------------------------------------------------------------------------------------------- positions
@pytest.fixture(scope="module")
def short(demo_base, tmp_path_factory) -> Path:
    """The demo's model, but for its positions: 96, where a prompt has more."""
    folder = Path(shutil.copytree(demo_base / "model", tmp_path_factory.mktemp("short") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    return folder


def test_training_beyond_the_positions(short, demo_base, tmp_path):
    """Both trainings refuse constants that promise more tokens than the model reads, before they write anything."""
    flags = ["--cpu", "--model", short, "--dataset", demo_base / "data", "--output", tmp_path / "run"]
    with pytest.raises(UserError, match="MODEL .*reads at most 96 .*MAX_PROMPT_TOKENS 384 . MAX_COMPLETION_TOKENS 512"):
        train_grpo.main([*map(str, flags)])
    line = {"prompt": to_prompt("1+1="), "completion": [{"role": "assistant", "content": TRACE}]}
    (tmp_path / "traces.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="MODEL .* reads at most 96 tokens, fewer than MAX_TOKENS 1024"):
        train_sft.main([*map(str, [*flags, "--traces", tmp_path / "traces.jsonl"])])
    assert not (tmp_path / "run").exists()


def test_asking_beyond_the_positions(short, demo_base, tmp_path, run_chat):
    """evaluate.py, chat.py and make_traces.py end in a line that says how long prompt and answer may get."""
    data, words = str(demo_base / "data"), r"reads at most 96 tokens, fewer than prompt \d+ . MAX_COMPLETION_TOKENS "
    with pytest.raises(UserError, match=f"{words}{chat.MAX_TOKENS}"):
        run_chat(short, "--cpu", stdin=f"{QUESTION}\n")
    words += str(train_grpo.MAX_COMPLETION_TOKENS)
    with pytest.raises(UserError, match=words):
        evaluate.main([str(short), "--dataset", data, "--cpu", "--output", str(tmp_path)])
    with pytest.raises(UserError, match=words):
        make_traces.main(["--model", str(short), "--dataset", data, "--cpu", "--output", str(tmp_path / "traces")])


@pytest.mark.parametrize("kind", [Sampler, PlainSampler])
def test_samplers_use_every_position_and_no_more(kind):
    """As many tokens as there are positions are made; one more would be an IndexError in GPT-2 and is a line."""
    tokenizer = make_tokenizer(CHATML_TEMPLATE)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=len(tokenizer) - 1, **shape)).eval()
    if kind is Sampler:  # which covers no GPT-2
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=24, **SHAPE)).eval()
    sampler = kind(model, tokenizer)
    assert len(sampler.generate([[5] * 20, [6]], 4)) == 2
    with pytest.raises(UserError, match="at most 24 tokens, fewer than prompt 20 . MAX_COMPLETION_TOKENS 5"):
        sampler.generate([[5] * 20, [6]], 5)
    with pytest.raises(UserError, match="at most 24 tokens"):
        next(sampler.stream([5] * 20, 5))


def test_models_without_a_limit():
    """Where a configuration names no positions, or -1, any length is read."""
    for config in (SimpleNamespace(), SimpleNamespace(max_position_embeddings=-1)):
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda config=config: config))
        models.check_positions(model, "it", tokens=10**6)


# -------------------------------------------------------------------------------------------------------------- LoRA
def test_no_adapter_for_the_head():
    """lm_head, for which TRL takes no adapter, is refused in a line and is not among the names that it offers."""
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, **SHAPE))
    recipe = SimpleNamespace(**train_grpo.default_recipe() | {"USE_LORA": True, "LORA_MODULES": ["q_proj", "lm_head"]})
    with pytest.raises(UserError, match="no 'lm_head' below its head .it has: down_proj, .*, v_proj") as error:
        lora_config(recipe, model)
    assert str(error.value).count("lm_head") == 1
    recipe.LORA_MODULES = ["q_proj"]
    assert lora_config(recipe, model).target_modules == {"q_proj"}
