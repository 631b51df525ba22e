"""The decode loop gives what `model.generate` gives, with the weights of the moment, and leaves the model alone.

All on tiny random models on the CPU. The captured step is stood in for by a "graph" that runs the same step on the
same tensors, so that everything but CUDA's own part of it (`Sampler._capture`) is covered; check_rollout.py does that.
"""

import copy
import io
import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from conftest import run_two_processes
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from engine import rollout
from engine.rollout import CHECK_EVERY, PlainSampler, Rollout, Sampler, make_sampler, why_not

VOCABULARY, PAD, EOS = 32, 0, 1
START = [4, 9, 2, 11]  # what all prompts of ALIKE begin with
MIXED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6, 7], [20, 21, 22, 23, 24], [30, 2]]

ALIKE = [START + rest for rest in MIXED]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w31"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=template
    )


def make_model(kind: str = "Qwen2", **changes) -> Qwen2ForCausalLM:
    """Large random weights, so that no two tokens are nearly alike."""
    config, model = {
        "Qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "Qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "Llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    torch.manual_seed(0)
    return model(config(**shape | changes))


def replayed(sampler: Sampler) -> Sampler:
    """Take the path of captured graphs: the step runs a few times, then only ever on the tensors of that moment."""

    def capture(batch):
        with torch.random.fork_rng([]):
            for _ in range(2):
                sampler.step(batch)
        frozen = copy.copy(batch)
        frozen.keys, frozen.values = list(batch.keys), list(batch.values)
        return SimpleNamespace(replay=lambda: sampler.step(frozen))

    sampler._replays, sampler._capture = lambda: sampler.use_graph, capture
    return sampler


@pytest.fixture(autouse=True)
def roomy_card(monkeypatch):
    """There is no card to ask how much of it is free."""
    monkeypatch.setattr(rollout, "_free_share", lambda device: 1.0)


class Recorder(Sampler):
    """Keeps the logits that every token was picked from, by row."""

    logits: list[dict[int, torch.Tensor]]

    def _pick(self, batch, logits):
        self.logits.append(dict(zip(batch.live.tolist(), logits.clone(), strict=True)))
        super()._pick(batch, logits)


def make_loop(model, path: str = "eager", autocast=None, kind: type[Sampler] = Sampler) -> Sampler:
    sampler = kind(model, make_tokenizer(), autocast)
    sampler.logits = []
    return replayed(sampler) if path == "replayed" else sampler


both_paths = pytest.mark.parametrize("path", ["eager", "replayed"])


def reference(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy completions by `model.generate`, one prompt at a time: no padding, nothing shared."""
    config = {"do_sample": False, "use_cache": True, "eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": new}
    rows = [model.generate(torch.tensor([prompt]), **config)[0, len(prompt) :].tolist() for prompt in prompts]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@both_paths
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_greedy_equals_generate(kind, path):
    """Mixed lengths, a duplicate, and a second call whose prompts are longer and fewer than the first one's."""
    model = make_model(kind).eval()
    sampler = make_loop(model, path)
    assert sampler.generate(MIXED, 40) == reference(model, MIXED, 40)
    longer = [list(range(2, 31)) * 2, [3, 4]]
    assert sampler.generate(longer, 40) == reference(model, longer, 40)
    assert sampler.generate(MIXED, 40) == reference(model, MIXED, 40)
    assert sampler.generate([], 40) == []


@both_paths
def test_rows_that_finish_early(path):
    """Rows end at very different tokens; whoever has ended neither changes nor is changed by the others."""
    model = make_model().eval()
    prompts = [[2 + i % 30, 2 + (7 * i) % 30] for i in range(25)]
    sampler = make_loop(model, path, kind=Recorder)
    completions = sampler.generate(prompts, 60)
    assert completions == reference(model, prompts, 60)
    assert len({len(row) for row in completions}) > 5
    assert path == "replayed" or len(sampler.logits[-1]) < len(prompts), "no finished row was dropped"


@both_paths
@pytest.mark.parametrize("at_once", [1, 18, 2048])
def test_prompts_that_begin_alike(path, at_once, monkeypatch):
    """What all prompts begin with is read once, and their rests by length, so many tokens at a time."""
    shapes = []

    class Counter(Sampler):
        def _forward(self, batch, tokens, *rest):
            if batch.reading:
                shapes.append(tuple(tokens.shape))
            return super()._forward(batch, tokens, *rest)

    monkeypatch.setattr(rollout, "READ_AT_ONCE", at_once)
    model = make_model().eval()
    sampler = make_loop(model, path, kind=Counter)
    assert sampler.generate(ALIKE, 40) == reference(model, ALIKE, 40)
    alone, in_pairs = [(1, 1), (1, 2), (1, 3), (1, 5), (1, 9)], [(2, 2), (2, 5), (1, 9)]
    assert shapes == [(1, len(START)), *{1: alone, 18: in_pairs, 2048: [(5, 9)]}[at_once]]
    assert sampler.generate(MIXED, 40) == reference(model, MIXED, 40), "nothing is shared in this call"
    nested = [START, *ALIKE]  # one prompt is the beginning of the others
    assert sampler.generate(nested, 40) == reference(model, nested, 40)


@both_paths
@pytest.mark.parametrize("prompts", [MIXED, ALIKE], ids=["mixed", "alike"])
def test_log_probabilities_equal_a_teacher_forced_forward(path, prompts):
    """The loop's log-probability of each sampled token is that of one plain forward over the whole text."""
    model = make_model().eval()
    sampler = make_loop(model, path, kind=Recorder)
    sampler.generate(prompts, 1, temperature=1.3)
    sampler.generate(prompts, 2, temperature=1.3)  # any capture is behind us
    sampler.logits.clear()
    completions = sampler.generate(prompts, 24, temperature=1.3)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ours = torch.stack([step[row] for step in sampler.logits[: len(completion)]])
        with torch.no_grad():
            forced = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(ours.log_softmax(-1), forced.log_softmax(-1), atol=1e-4, rtol=0)


@both_paths
def test_sampling_draws_from_softmax(path):
    """Chi-square of first and second tokens against softmax(logits / temperature); a seed repeats, another does not."""
    model, n, temperature = make_model(initializer_range=0.15).eval(), 8000, 0.7
    sampler = make_loop(model, path)
    torch.manual_seed(1)
    completions = sampler.generate([[5, 6, 7]] * n, 2, temperature)
    first = max(range(2, VOCABULARY), key=[row[0] for row in completions].count)
    for prefix in ([], [first]):
        with torch.no_grad():
            expected = (model(torch.tensor([[5, 6, 7, *prefix]])).logits[0, -1] / temperature).softmax(-1)
        drawn = [row[len(prefix)] for row in completions if row[: len(prefix)] == prefix]
        observed = torch.tensor(drawn).bincount(minlength=VOCABULARY)
        common = expected * len(drawn) >= 5
        chi2 = ((observed - expected * len(drawn)) ** 2 / (expected * len(drawn)))[common].sum()
        freedom = int(common.sum()) - 1
        assert freedom > 10 and chi2 < freedom + 4 * (2 * freedom) ** 0.5
    torch.manual_seed(1)
    assert sampler.generate([[5, 6, 7]] * n, 2, temperature) == completions
    torch.manual_seed(2)
    assert sampler.generate([[5, 6, 7]] * n, 2, temperature) != completions


def test_drawn_in_parts(monkeypatch):
    """How many rows a CPU draws at a time changes no token."""
    sampler, completions = make_loop(make_model().eval()), []
    for at_once in (rollout.DRAW_AT_ONCE, 3 * VOCABULARY, 1):
        monkeypatch.setattr(rollout, "DRAW_AT_ONCE", at_once)
        torch.manual_seed(1)
        completions.append(sampler.generate(MIXED * 3, 8, temperature=1.5))
    assert completions[0] == completions[1] == completions[2]


@both_paths
def test_ends(path):
    """A sampled row holds its end token once, at its end, or has full length; one-token answers work both ways."""
    model = make_model().eval()
    sampler = make_loop(model, path)
    completions = sampler.generate(MIXED * 10, 30, temperature=2.0)
    assert all(EOS not in row[:-1] and (row[-1] == EOS or len(row) == 30) for row in completions)
    assert min(map(len, completions)) < 8 and max(map(len, completions)) == 30
    one = sampler.generate([[5, 6, 7], [8]], 1)
    assert [len(row) for row in one] == [1, 1]
    model.generation_config.eos_token_id = [EOS, one[0][0]]  # now the first answer ends with its first token
    sampler = make_loop(model, path, kind=Recorder)
    assert sampler.generate([[5, 6, 7]], 30) == one[:1]
    assert len(sampler.logits) <= CHECK_EVERY + 2, "it went on although all rows had ended"


@both_paths
def test_spoilt_weights(path):
    """NaN weights give tokens of the vocabulary all the same: the run lives on to the alarm that names the trouble."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        completions = make_loop(model, path).generate(MIXED, 4, temperature)
        assert all(0 <= token < VOCABULARY for completion in completions for token in completion)


@both_paths
def test_smaller_last_batch(path):
    """Fewer rows after many, as at the end of an evaluation, and a question asked alone."""
    model = make_model().eval()
    sampler = make_loop(model, path)
    sampler.generate(MIXED * 3, 20, temperature=1.0)
    for prompts in (MIXED[:4], MIXED[2:3], MIXED):
        assert sampler.generate(prompts, 20) == reference(model, prompts, 20)


def test_stream():
    """Chat sees the same tokens one by one, and not the end token."""
    model = make_model().eval()
    sampler = make_loop(model, "eager")
    for prompt, completion in zip(MIXED, reference(model, MIXED, 60), strict=True):
        assert list(sampler.stream(prompt, 60)) == [token for token in completion if token != EOS]
        assert list(PlainSampler(model, make_tokenizer()).stream(prompt, 60)) == list(sampler.stream(prompt, 60))


def test_plain_sampler():
    """Equal to the loop, whatever the model's own generation_config says, and it restores the training mode."""
    model = make_model()
    expected = Sampler(model, make_tokenizer()).generate(MIXED, 30)
    model.generation_config.update(top_k=3, top_p=0.5, temperature=0.3, repetition_penalty=1.9, do_sample=True)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    plain = PlainSampler(model, make_tokenizer())
    assert plain.generate(MIXED, 30) == expected
    assert model.training and plain.generate([], 30) == []
    torch.manual_seed(0)
    drawn = {row[0] for row in plain.generate([[5, 6, 7]] * 500, 1, temperature=1.0)}
    assert len(drawn) > 3, "the model's own top_k narrowed the sampling"


def test_weights_of_the_moment():
    """In float32 nothing is copied; changed, reloaded and moved weights are seen without being told."""
    model = make_model().eval()
    sampler = Sampler(model, make_tokenizer())
    sampler.generate(MIXED, 5)
    assert not sampler.copies
    assert {p.data_ptr() for p in sampler.shadow.parameters()} == {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    assert sampler.generate(MIXED, 20) == reference(model, MIXED, 20)
    model.load_state_dict({name: tensor.flip(0) for name, tensor in model.state_dict().items()})
    assert sampler.generate(MIXED, 20) == reference(model, MIXED, 20)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(64, 32))
    assert sampler.generate(MIXED, 20) == reference(model, MIXED, 20)
    model.double()
    assert sampler.generate(MIXED, 20) == reference(model, MIXED, 20)


def make_lora_model(model=None, **settings):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | settings
    torch.manual_seed(0)
    return get_peft_model(model or make_model(), LoraConfig(**settings)).eval()


def merged(model):
    """The same model without PEFT, its active adapters merged into float32 weights."""
    return copy.deepcopy(model).merge_and_unload()


@both_paths
def test_lora_is_applied(path):
    """In float32 the loop equals the merged model; nothing is copied or changed, and no changed adapter goes stale."""
    model = make_lora_model()
    sampler = make_loop(model, path)
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert sampler.generate(MIXED, 30) == reference(merged(model), MIXED, 30)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not sampler.copies
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.data.mul_(-1.5 if "lora_A" in name else 1)
    with model.disable_adapter():
        plain = reference(model, MIXED, 30)
    assert plain != reference(merged(model), MIXED, 30), "LoRA made no difference"


@both_paths
def test_lora_as_peft_has_it_at_the_moment(path):
    """Two adapters of unlike scale and layers, both, one or none active, merged or not: as PEFT's own forward."""
    model = make_lora_model()
    other = LoraConfig(r=2, lora_alpha=9, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    sampler, lora = make_loop(model, path), model.base_model
    seen = []

    def check():
        seen.append(sampler.generate(MIXED, 30))
        assert seen[-1] == reference(model, MIXED, 30)

    check()
    lora.set_adapter(["default", "other"])
    check()
    lora.set_adapter("other")
    check()
    model.get_base_model().model.layers[0].self_attn.q_proj.scaling["other"] *= 3
    check()
    with model.disable_adapter():
        check()
    lora.merge_adapter()
    check()
    assert seen[3] == seen[5] and len({str(made) for made in seen}) == 5


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
def test_small_adapters_act_as_in_training(size):
    """Under autocast an adapter changes log-probabilities as in the trainer's forward, however small its B is.

    Base weights that are exact in bf16, as from the hub: merged into them most of such an adapter would round away.
    """
    base = make_model(hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.05)
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model = make_lora_model(base, r=16, lora_alpha=32, target_modules="all-linear")
    prompts = torch.randint(2, VOCABULARY, (32, 24), generator=torch.Generator().manual_seed(3))
    sampler = make_loop(model, autocast=torch.bfloat16, kind=Recorder)

    def log_probabilities(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the token after each prompt: the sampler's, and those of the trainer's forward."""
        draw = torch.Generator().manual_seed(1)
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.data = spread * torch.randn(tensor.shape, generator=draw)
        sampler.logits.clear()
        sampler.generate(prompts.tolist(), 1)
        ours = torch.stack([sampler.logits[0][row] for row in range(len(prompts))])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            theirs = model(prompts).logits[:, -1]
        return ours.float().log_softmax(-1), theirs.float().log_softmax(-1)

    (ours, theirs), (our_base, their_base) = log_probabilities(size), log_probabilities(0.0)
    effect, expected = ours - our_base, theirs - their_base
    assert expected.norm() > 0
    assert (effect - expected).norm() < 0.3 * expected.norm()


def test_exact_copy_rounds_as_the_trainer():
    """Under bf16 autocast the loop's logits lie as close to the trainer's as a plain cached decode does."""
    model = make_model().eval()
    sampler = make_loop(model, autocast=torch.bfloat16, kind=Recorder)
    completions = sampler.generate(MIXED, 24)
    for row, (prompt, completion) in enumerate(zip(MIXED, completions, strict=True)):
        ours = torch.stack([step[row] for step in sampler.logits[: len(completion)]]).float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            forced = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        assert (ours.log_softmax(-1) - forced.log_softmax(-1)).abs().mean() < 0.05
    kinds = {name.split(".")[-2]: tensor.dtype for name, tensor in sampler.shadow.named_parameters()}
    assert kinds["embed_tokens"] == kinds["norm"] == kinds["input_layernorm"] == torch.float32
    assert kinds["q_proj"] == kinds["down_proj"] == kinds["lm_head"] == torch.bfloat16
    assert sampler.shadow.model.rotary_emb.inv_freq is model.model.rotary_emb.inv_freq


@both_paths
def test_training_model_is_left_alone(path):
    """Checkpointing, training mode, config and forward stay bit for bit, causal mask and gradients included."""
    model = make_model()
    model.set_attn_implementation("eager")  # the loop's own choice, sdpa, must not get into it
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    config, text = copy.deepcopy(model.config.__dict__), torch.tensor([MIXED[2] + MIXED[4]])

    def look():
        model.zero_grad()
        output = model(text, labels=text)
        output.loss.backward()
        return [output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    before = look()
    modules = [(name, id(module), set(module.__dict__)) for name, module in model.named_modules()]
    for autocast in (None, torch.bfloat16):
        make_loop(model, path, autocast).generate(MIXED, 12, temperature=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, look(), strict=True))
    assert modules == [(name, id(module), set(module.__dict__)) for name, module in model.named_modules()]
    assert model.training and model.config.__dict__ == config
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()
    assert Sampler(model.train(), make_tokenizer()).generate(MIXED, 30) == reference(model.eval(), MIXED, 30)


class FakeCuda:
    """As much of torch.cuda as a capture touches; `graph` fails at its end, as CUDA's does after a forbidden call."""

    def __init__(self, monkeypatch, error: Exception):
        self.now, self.error = "default", error
        names = ("stream", "graph", "current_stream", "set_stream")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        side = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
        fork = torch.random.fork_rng
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork([]))

    def current_stream(self, device):
        return SimpleNamespace(name=self.now, wait_stream=lambda other: None)

    def set_stream(self, stream):
        self.now = stream.name

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, "side"
        yield
        self.now = before

    @contextmanager
    def graph(self, graph, **_):
        self.now = "side"
        yield
        raise self.error


def test_failing_capture_falls_back(monkeypatch, capsys):
    """Without a graph the same completions come; stream and random state are as before, and one line says it."""
    model = make_model().eval()
    sampler = Sampler(model, make_tokenizer())
    torch.manual_seed(0)
    drawn = [sampler.generate(MIXED, 20, temperature=1.0) for _ in range(2)]
    cuda = FakeCuda(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nand more"))
    sampler._replays = lambda: sampler.use_graph
    torch.manual_seed(0)
    assert [sampler.generate(MIXED, 20, temperature=1.0) for _ in range(2)] == drawn
    assert cuda.now == "default" and not sampler.use_graph
    assert sampler.generate(MIXED[::-1], 20) == reference(model, MIXED[::-1], 20)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "without a CUDA graph" in lines[0] and "not permitted" in lines[0]


def test_capture_out_of_memory(monkeypatch):
    """Too little memory is no reason to go on step by step: it is told, and the stream is as before."""
    sampler = Sampler(make_model(), make_tokenizer())
    cuda = FakeCuda(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    sampler._replays = lambda: sampler.use_graph
    with pytest.raises(torch.OutOfMemoryError):
        sampler.generate(MIXED, 20)
    assert cuda.now == "default" and sampler.use_graph


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_few_new_tokens_leave_room_for_the_warm_up(new, temperature):
    """A capture's warm-up makes two tokens; where one is wanted and the columns are used up, they must have a place."""
    sampler = make_loop(make_model().eval(), "replayed")
    for width in (62, 63, 64):
        prompts = [list(range(2, 2 + 30)) * 2 + [5] * (width - 60), [3, 4]]
        assert {len(row) for row in sampler.generate(prompts, new, temperature)} <= {1, new}
        assert {len(row) for row in sampler.generate(prompts, new, 1.0 - temperature)} <= {1, new}


def test_captured_batches(monkeypatch):
    """A batch is kept for as many rows, made anew for others, and dropped where the card is full."""
    model = make_model().eval()
    sampler = make_loop(model, "replayed")
    share, sizes = 1.0, []
    monkeypatch.setattr(rollout, "_free_share", lambda device: share)
    sampler.beside_training = True
    for prompts in (MIXED, MIXED[::-1], MIXED[:1], MIXED):
        assert sampler.generate(prompts, 20) == reference(model, prompts, 20)
        sizes.append(sampler.batch)
    assert sizes[0] is sizes[1] and [len(batch.done) for batch in sizes] == [6, 6, 1, 6]
    share = 0.2
    for _ in range(2):
        assert sampler.generate(MIXED, 20) == reference(model, MIXED, 20)
        assert sampler.batch is None and not sampler.graphs


def test_model_moved_after_the_sampler_was_made():
    """A model that has been moved since: device and end tokens follow it."""
    model = make_model().eval()
    policy = copy.deepcopy(model).to("meta")
    sampler = Sampler(policy, make_tokenizer())
    for name, module in policy.named_modules():
        module._parameters.update(model.get_submodule(name)._parameters)
        module._buffers.update(model.get_submodule(name)._buffers)
    assert sampler.generate(MIXED, 20) == reference(model, MIXED, 20)
    assert sampler.device.type == "cpu"


@pytest.mark.parametrize(
    "setting, reason",
    [
        ({}, None),
        ({"top_k": 20}, "top_k=20"),
        ({"top_p": 0.8}, "top_p=0.8"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "generation_kwargs"),
    ],
)
def test_why_not_settings(tmp_path, setting, reason):
    """Every setting of a run that the loop would ignore is named; the defaults are covered."""
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    for name, value in setting.items():
        setattr(args, name, value)
    answer = why_not(make_model(), args)
    assert answer is None if reason is None else reason in answer


def test_why_not_models(capsys):
    """Other architectures, attention, positions and adapters are refused with a line; a PlainSampler takes them."""
    sliding = make_model(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    dynamic = make_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    dora = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    embedding = get_peft_model(make_model(), LoraConfig(target_modules=["embed_tokens"]))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))
    for model, reason in (
        (sliding, "window"),
        (dynamic, "positions"),
        (dora, "LoRA"),
        (embedding, "LoRA"),
        (gpt2, "gpt2"),
    ):
        assert reason in why_not(model)
        assert isinstance(make_sampler(model, make_tokenizer()), PlainSampler)
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert type(make_sampler(make_model(), make_tokenizer())) is Sampler
    assert make_sampler(sliding, make_tokenizer()).generate(MIXED, 20) == reference(sliding.eval(), MIXED, 20)


def odd_tokens(completion_ids, **_) -> list[float]:
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def make_trainer(folder, rollout, model=None, **settings) -> GRPOTrainer:
    questions = [{"prompt": [{"role": "user", "content": f"w{i} w{i + 1} " + "w5 " * (i % 4)}]} for i in range(2, 26)]
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
    defaults |= {"max_completion_length": 12, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no"}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return GRPOTrainer(
        model=model or make_model(),
        reward_funcs=odd_tokens,
        args=GRPOConfig(str(folder), **defaults | settings),
        train_dataset=Dataset.from_list(questions),
        processing_class=make_tokenizer(),
        rollout_func=rollout,
    )


class Watch(Rollout):
    """After every generation, compare the copies with the policy and remember what was made."""

    def __call__(self, prompts, trainer):
        made = super().__call__(prompts, trainer)
        policy = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters(remove_duplicate=False))
        assert all(parameter.dtype == torch.float32 for parameter in policy.values())
        shadow = dict(self.sampler(trainer).shadow.named_parameters(remove_duplicate=False))
        assert policy.keys() == shadow.keys()
        for name, weight in shadow.items():
            assert torch.equal(weight, policy[name].to(weight.dtype)), name
        self.made = [*getattr(self, "made", []), made | {"prompts": prompts}]
        self.seen = [*getattr(self, "seen", []), shadow["lm_head.weight"].clone()]
        return made


@pytest.mark.parametrize("bf16, checkpointing", [(True, True), (False, False)])
def test_training(tmp_path, bf16, checkpointing):
    """Three real GRPO steps: the copy has the policy's weights after each, and the prompts are TRL's."""
    rollout = Watch()
    trainer = make_trainer(tmp_path, rollout, bf16=bf16, gradient_checkpointing=checkpointing)
    trainer.train()
    assert len(rollout.made) == 3 and not torch.equal(rollout.seen[0], rollout.seen[2])
    assert {weight.dtype for weight in rollout.seen} == {torch.bfloat16 if bf16 else torch.float32}
    assert rollout.sampler(trainer) is rollout.sampler(trainer)
    made = [row for step in rollout.made for row in step["completion_ids"]]
    assert rollout.tokens == sum(map(len, made)) and rollout.seconds > 0
    assert all(step["prompt_ids"] == trainer._tokenize_prompts(step["prompts"])[0] for step in rollout.made)
    trainer.model.eval()
    if not bf16:
        assert rollout.sampler(trainer).generate(MIXED, 20) == reference(trainer.model, MIXED, 20)


def test_training_repeats_and_falls_back(tmp_path, capsys):
    """A seed gives the same completions in two runs; a setting that is not covered goes TRL's way, said once."""
    runs = []
    for settings in ({}, {}, {"top_k": 2}):
        rollout = Rollout()
        trainer = make_trainer(tmp_path, rollout, max_steps=2, **settings)
        trainer.train()
        runs.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        assert rollout.tokens > 0
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    assert sum("top_k=2" in line for line in capsys.readouterr().out.splitlines()) == 1


def train_a_rank(folder) -> None:
    """One of two processes: two steps, and what it generated for them."""
    rollout = Watch()
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "ddp_find_unused_parameters": False}
    make_trainer(folder, rollout, max_steps=2, **split).train()
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(rollout.made))
    torch.distributed.barrier()


def test_two_ranks_draw_differently(tmp_path):
    """Under DDP the two halves of a group have the same prompt and different completions, from the same weights."""
    assert run_two_processes(train_a_rank, tmp_path) == [0, 0]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert [step["prompt_ids"] for step in one] == [step["prompt_ids"] for step in two]
    for a, b in zip(one, two, strict=True):
        assert a["completion_ids"] != b["completion_ids"]


@pytest.mark.parametrize("plain", [False, True])
def test_progress_within_a_batch(plain):
    """A batch can take minutes on a CPU: a bar hears how many answers have ended, and in the end of all of them."""
    from engine import accuracy

    model, heard = make_model().eval(), []
    sampler = (PlainSampler if plain else Sampler)(model, make_tokenizer())
    prompts = [[2 + i % 30, 2 + (7 * i) % 30] for i in range(25)]
    lengths = [len(row) for row in sampler.generate(prompts, 60, on_progress=heard.append)]
    if not plain:
        expected = [sum(length <= look for length in lengths) for look in range(CHECK_EVERY, 61, CHECK_EVERY)]
        assert heard == expected[: len(heard)] and len(heard) > 5
    bars = []

    class Bar(accuracy.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"file": io.StringIO()})
            bars.append([])

        def update(self, n=1):
            super().update(n)
            bars[-1].append(self.n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "tqdm", Bar)
        tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids])
        rows = {"prompt": [[{"content": "x"}]] * 25, "answer": [1] * 25}
        patch.setattr(accuracy, "encode", lambda *_: prompts)
        accuracy.evaluate(sampler, tokenizer, rows, 60, batch_size=10, title="x")
    [seen] = bars
    assert seen == sorted(seen) and seen[-1] == 25 and (len(seen) == 3) == plain
