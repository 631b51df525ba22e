"""How completions are made: one decode loop for training, evaluation and chat.

`model.generate`, which TRL calls, launches every small kernel of every token from Python. Under autocast it also casts
every weight again for every token. The loop here is faster for three reasons:

1. A *shadow* of the policy runs the forward pass: the same architecture on the trainer's own tensors. Where training
   autocasts, its linear layers hold copies in the lower precision, so that it rounds as the trainer rounds, but casts
   once per generation.
2. Each distinct prompt is read once, and its keys and values are copied to all of its completions. What all prompts
   begin with, the system prompt say, is read once for all of them.
3. On CUDA one decode step is captured as a graph and replayed. Elsewhere the step runs eagerly, and finished rows are
   dropped.

`Rollout` is what GRPOTrainer gets as `rollout_func`. What `why_not` names is left to `model.generate`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.console import first_line, note
from engine.models import check_positions
from engine.templates import encode

if TYPE_CHECKING:  # chat and evaluation do not wait for the import of TRL
    from transformers import Trainer, TrainingArguments
    from trl import GRPOTrainer

CHECK_EVERY = 4  # tokens between two looks at which rows have finished; each look makes a GPU wait for microseconds
DRAW_AT_ONCE = 2**20  # probabilities that a CPU computes and draws from at a time; more do not fit its caches
READ_AT_ONCE = 2048  # tokens of prompts in one forward pass; more make a CPU slower, since they do not fit its caches
WARM_UP = 2  # steps before a capture; they allocate what PyTorch allocates on first use
TRIED = ("llama", "qwen2", "qwen3")  # the architectures that tests/test_rollout.py compares with model.generate


def why_not(model: PreTrainedModel, args: TrainingArguments | None = None) -> str | None:
    """Why the loop below does not cover this model, or the training run of `args`; None where it does."""
    settings = {"top_k": (0, None), "top_p": (1.0,), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
    for name in ("generation_kwargs", "cache_implementation", "use_transformers_continuous_batching"):
        settings[name] = (None, False, {})
    for name, neutral in settings.items():
        if (value := getattr(args, name, neutral[0])) not in neutral:  # SFTConfig has none of these
            return f"{name}={value}"
    for adapter in getattr(model, "peft_config", {}).values():
        special = ("lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
        if adapter.peft_type != "LORA" or any(getattr(adapter, name, None) for name in special):
            return "the adapter is not a plain LoRA"
    for layer in _lora_layers(model):  # DoRA and the like are variants
        if layer.lora_variant or not isinstance(layer.get_base_layer(), torch.nn.Linear):
            return "the adapter is not a plain LoRA of linear layers"
    base = _base(model)
    if getattr(base, "is_quantized", False):
        return "the weights are quantized"
    layers = set(getattr(base.config, "layer_types", None) or ["full_attention"])
    rope = (getattr(base.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if base.config.model_type not in TRIED:
        return f"not tried with a {base.config.model_type} model"
    if layers != {"full_attention"}:
        return "a sliding window limits its attention"
    if rope in ("dynamic", "longrope"):
        return f"positions of type {rope!r} depend on the length"
    return None


def _base(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _lora_layers(model: PreTrainedModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _adapters(layer: LoraLayer) -> list[tuple[str, float]]:
    """Names and scales of the adapters that a LoRA layer adds to the output of its base layer."""
    if layer.merged or layer.disable_adapters:
        return []
    return [(name, layer.scaling[name]) for name in layer.active_adapters if name in layer.lora_A]


def _cut(row: list[int], eos: list[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in eos), len(row))]


def _free_share(device: torch.device) -> float:
    """The share of a GPU's memory that is free, or that PyTorch holds unused."""
    free, total = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / total


def _draw(logits: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """The tokens (rows,) at which the cumulated softmax reaches the uniform `draw` (rows, 1).

    torch.multinomial would make the GPU wait.
    """
    cumulated = logits.softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulated, draw * cumulated[:, -1:])[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)  # NaN gives an index too large; the monitor reports it


class LoraLinear(torch.nn.Linear):
    """A linear layer and its adapters, computed as in PEFT's own forward pass.

    Merging an adapter into a bf16 weight would lose most of it: its values lie far below the weight's last bit.
    """

    def __init__(self, linear: torch.nn.Linear, low_rank: list[tuple[torch.Tensor, torch.Tensor, float]]):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device)
        self.low_rank = low_rank  # of each adapter: A (rank, in features), B (out features, rank), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in features) -> (..., out features)"""
        output = base = super().forward(x)
        for a, b, scale in self.low_rank:
            low = torch.nn.functional.linear(x.to(a.dtype), a)
            output = output + torch.nn.functional.linear(low, b) * scale
        return output.to(base.dtype)


class Reading(NamedTuple):
    """Which rows of a batch are written while some prompts are read, and where."""

    rows: torch.Tensor  # (R,)
    source: torch.Tensor  # (R,) the prompt of each, among those that are read
    begin: int  # the first column that is written
    behind: int  # so many columns of the first row are read by all of these prompts before their own


class Batch:
    """The rows of one generation and their keys and values. The model gets it as `past_key_values`.

    There are B rows and S columns. A row is what all prompts begin with, padding, the rest of its prompt, and its
    completion, so all rows write the same column at a time. The column's number is a tensor on the device, so a
    captured step can increase it.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype | None = None):
        self.dtype = dtype  # of keys and values; None: the type that the model computes
        self.keys: list[torch.Tensor] = []  # per layer (B, heads, S, head size); `update` allocates them
        self.values: list[torch.Tensor] = []
        self.tokens = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.live = torch.arange(rows, device=device)  # the rows that are still in keys, values and pads
        self.shared = torch.zeros((), dtype=torch.long, device=device)  # columns before the padding
        self.pads = torch.zeros(rows, 1, dtype=torch.long, device=device)  # columns of padding
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.columns = torch.arange(columns, device=device)
        self.seen = columns  # attention reads this many columns; in a captured step all, since shapes are fixed
        self.temperature = torch.zeros((), device=device)
        self.greedy = True
        self.reading: Reading | None = None  # only while prompts are read

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what a layer computed, and return what it attends to. The model calls no other method of a cache."""
        if self.reading is not None:  # key and value are (prompts, heads, width, head size)
            rows, source, begin, behind = self.reading
            if layer == len(self.keys):
                for new, stored in ((key, self.keys), (value, self.values)):
                    shape = (len(self.live), new.shape[1], self.tokens.shape[1], new.shape[3])
                    # zeros, because attention multiplies masked values by 0, and 0 x NaN is NaN
                    stored.append(new.new_zeros(shape, dtype=self.dtype))
            read = []
            for new, stored in ((key, self.keys[layer]), (value, self.values[layer])):
                stored[rows, :, begin : begin + new.shape[2]] = new[source].to(stored.dtype)
                before = stored[:1, :, :behind].to(new.dtype)  # what all prompts begin with
                read.append(torch.cat([before.expand(len(new), -1, -1, -1), new], dim=2))
            return read[0], read[1]
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.column, key.to(keys.dtype))
        values.index_copy_(2, self.column, value.to(values.dtype))
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def drop_finished(self) -> None:
        """Free the finished rows. It changes shapes and addresses, so no captured step may follow."""
        keep = (~self.done[self.live]).nonzero()[:, 0]
        self.live, self.pads = self.live[keep], self.pads[keep]
        self.keys = [key[keep] for key in self.keys]
        self.values = [value[keep] for value in self.values]


class Sampler:
    """The decode loop over a shadow of `model`. Every call uses the weights that `model` has at that moment.

    Args:
        model: the policy, with or without a PEFT adapter; it is never changed.
        tokenizer: gives the ids of the end and of padding.
        autocast: the precision that the policy trains under, such as torch.bfloat16; None: that of its weights.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None):
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.eos = list({*ends, tokenizer.eos_token_id} - {None})  # the model's own and the tokenizer's, as in TRL
        self.use_graph = True  # replay a captured step on CUDA
        self.beside_training = False  # training needs memory on the same device
        self.batch: Batch | None = None  # what the captured steps read and write
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}  # greedy or not -> one captured step
        self._side: torch.cuda.Stream | None = None  # one for all captures: each has a workspace for matrix products
        self._layout: tuple[list, list] | None = None  # where the model's tensors lay when the shadow was built

    def generate(
        self,
        prompt_ids: list[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """One completion per prompt, in their order, with its end token. Temperature 0 takes the likeliest token.

        `on_progress` gets the number of finished completions now and then.
        """
        if not prompt_ids:
            return []
        *_, completions = self._decode(prompt_ids, max_new_tokens, temperature, on_progress)
        if self.beside_training and self.batch is not None and _free_share(self.device) < 0.5:
            self.batch, self.graphs = None, {}  # training needs this memory; a new capture takes 0.2 s
        return [_cut(row, self.eos) for row in completions.tolist()]

    def stream(self, prompt_ids: list[int], max_new_tokens: int, temperature: float = 0.0) -> Iterator[int]:
        """The completion of one prompt, token by token, without the end token."""
        for completions in self._decode([prompt_ids], max_new_tokens, temperature):
            token = completions[0, -1].item()
            if token in self.eos:
                return
            yield token

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring the shadow's copies up to date. All its other tensors are the model's own."""
        addresses = [parameter.data_ptr() for parameter in self.model.parameters()]
        layout = addresses, list(map(_adapters, _lora_layers(self.model)))
        if layout != self._layout:  # the first call, or tensors have moved, or other adapters are active
            self._layout = layout
            self._build_shadow()
        for target, source in self.copies:
            target.copy_(source)

    def _build_shadow(self) -> None:
        """Build a module of its own: what is patched into the trainer's model must not act here, nor the reverse."""
        self.device = next(self.model.parameters()).device
        self._ends = torch.tensor(self.eos, device=self.device)
        self.batch, self.graphs = None, {}
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # a copy in autocast's precision, and its original
        base = _base(self.model)
        with torch.device("meta"):  # without weights; the config is copied because building changes it
            self.shadow = type(base)._from_config(copy.deepcopy(base.config), attn_implementation="sdpa").eval()
        for name, module in list(self.shadow.named_modules()):
            owner, linear = base.get_submodule(name), isinstance(module, torch.nn.Linear)
            if isinstance(owner, LoraLayer):
                low_rank = [
                    (self._lowered(owner.lora_A[adapter].weight), self._lowered(owner.lora_B[adapter].weight), scale)
                    for adapter, scale in _adapters(owner)
                ]
                module = LoraLinear(module, low_rank)
                self.shadow.set_submodule(name, module)
                owner = owner.get_base_layer()
            for key, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                setattr(module, key, self._lowered(tensor) if linear else tensor)

    def _lowered(self, tensor: torch.nn.Parameter) -> torch.nn.Parameter:
        """A low-precision copy of a linear layer's tensor under autocast, else the tensor itself."""
        if self.autocast in (None, tensor.dtype):
            return tensor
        target = torch.nn.Parameter(torch.empty_like(tensor, dtype=self.autocast), requires_grad=False)
        self.copies.append((target, tensor))
        return target

    def _decode(
        self,
        prompt_ids: list[list[int]],
        new: int,
        temperature: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the completions so far, (rows, tokens), after every token. Behind a row's end token stands anything."""
        rows, width = len(prompt_ids), max(map(len, prompt_ids))
        check_positions(self.model, "the model", prompt=width, MAX_COMPLETION_TOKENS=new)
        self._refresh()
        batch = self._make_batch(rows, width + new)
        batch.greedy = temperature == 0
        batch.temperature.fill_(temperature)
        self._prefill(batch, prompt_ids, width)
        graph = self._graph(batch) if self._replays() else None
        for count in range(1, new + 1):
            yield batch.tokens[:, width : width + count]
            if count == new:
                return
            if count % CHECK_EVERY == 0:
                running, live = rows - int(batch.done.sum()), len(batch.live)
                if running == 0:
                    return
                if on_progress:
                    on_progress(rows - running)
                if graph is None and live - running > 0.1 * live:
                    batch.drop_finished()
            if graph is not None:
                graph.replay()
            else:
                batch.seen = width + count
                self.step(batch)

    def _replays(self) -> bool:
        return self.use_graph and self.device.type == "cuda"

    def _make_batch(self, rows: int, columns: int) -> Batch:
        if not self._replays():
            return Batch(rows, columns, self.device, self.autocast)
        columns = math.ceil((columns + WARM_UP) / 64) * 64  # the warm-up needs columns, even if one token is wanted
        if self.batch is None or rows != len(self.batch.done) or columns > len(self.batch.columns):
            self.batch, self.graphs = None, {}  # freed before the next one is allocated
            self.batch = Batch(rows, columns, self.device, self.autocast)
        return self.batch

    def _prefill(self, batch: Batch, prompt_ids: list[list[int]], width: int) -> None:
        """Read each distinct prompt once, and pick the first token of every row."""
        prompts = sorted(dict.fromkeys(map(tuple, prompt_ids)), key=len)  # those of like length together: less padding
        number = {prompt: i for i, prompt in enumerate(prompts)}
        source = torch.tensor([number[tuple(prompt)] for prompt in prompt_ids])  # (B,) the prompt of each row
        shared = len(os.path.commonprefix(prompts)) if len(prompts) > 1 else 0
        shared = min(shared, len(prompts[0]) - 1)  # of each prompt one token is left, whose logits are needed
        if shared:
            self._read(batch, [prompts[0][:shared]], torch.zeros_like(source), end=shared, behind=0)
        logits, at_once = [], max(READ_AT_ONCE // (width - shared), 1)
        for start in range(0, len(prompts), at_once):
            rests = [prompt[shared:] for prompt in prompts[start : start + at_once]]
            logits.append(self._read(batch, rests, source - start, end=width, behind=shared))
        batch.shared.fill_(shared)  # in place, here and below, because a graph holds addresses
        batch.pads.copy_(torch.tensor([[width - len(prompt)] for prompt in prompt_ids]))
        batch.column.fill_(width)
        batch.done.zero_()
        self._pick(batch, torch.cat(logits)[source.to(self.device)])

    def _read(self, batch: Batch, prompts: list, source: torch.Tensor, end: int, behind: int) -> torch.Tensor:
        """Read prompts, and write their keys and values into the columns before `end`.

        Args:
            source: (B,) which of `prompts` a row has; rows with another number are left alone.
            behind: they follow so many columns, which are the same in all rows.

        Returns:
            The logits after their last tokens, (prompts, vocabulary).
        """
        width = max(map(len, prompts))
        pads = torch.tensor([[width - len(prompt)] for prompt in prompts])  # (P, 1)
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])  # (P, width)
        columns = torch.arange(width)
        # A padding position attends to itself: its attention would be NaN if it attended to nothing.
        mask = (columns <= columns[:, None]) & (columns >= pads)[:, None] | (columns == columns[:, None])
        mask = torch.nn.functional.pad(mask, (behind, 0), value=True)  # (P, width, behind + width)
        rows = ((source >= 0) & (source < len(prompts))).nonzero()[:, 0]
        written = rows.to(self.device), source[rows].to(self.device)
        batch.reading = Reading(*written, end - width, behind)
        positions = behind + (columns - pads).clamp(min=0)
        logits = self._forward(batch, *(tensor.to(self.device) for tensor in (tokens, positions, mask)))
        batch.reading = None
        return logits

    def step(self, batch: Batch) -> None:
        """Feed every live row its newest token and pick the next one."""
        tokens = batch.tokens[batch.live, batch.column]
        columns = batch.columns
        padding = (columns >= batch.shared) & (columns < batch.shared + batch.pads)
        mask = (columns <= batch.column) & ~padding  # (live, S)
        logits = self._forward(batch, tokens[:, None], batch.column - batch.pads, mask[:, None, : batch.seen])
        batch.column += 1
        self._pick(batch, logits)

    @torch.no_grad()
    def _forward(self, batch: Batch, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) after the last of `tokens` (rows, T). `mask`: (rows, T, columns), True = attend."""
        lower = {"dtype": self.autocast, "enabled": self.autocast is not None}
        with torch.autocast(self.device.type, cache_enabled=False, **lower):
            return self.shadow(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask[:, None],
                past_key_values=batch,
                use_cache=True,  # the trainer writes False into the config
                logits_to_keep=1,
            ).logits[:, -1]

    def _pick(self, batch: Batch, logits: torch.Tensor) -> None:
        """Write the next token of each live row: the likeliest, or a draw from softmax(logits / temperature)."""
        if batch.greedy:
            tokens = logits.max(-1).indices  # argmax takes a CPU three times as long in bf16
        else:
            draws = 1 - torch.rand(len(logits), 1, device=self.device)  # in (0, 1]
            rows = len(logits) if self.device.type == "cuda" else max(DRAW_AT_ONCE // logits.shape[-1], 1)
            parts = zip(logits.split(rows), draws.split(rows), strict=True)
            tokens = torch.cat([_draw(part.float() / batch.temperature, draw) for part, draw in parts])
        done = batch.done[batch.live]
        # torch.where would copy the number from the host, which no graph may do
        tokens = tokens.masked_fill(done, self.tokenizer.pad_token_id)
        batch.tokens[batch.live, batch.column] = tokens
        batch.done[batch.live] = done | (tokens[:, None] == self._ends).any(-1)

    def _graph(self, batch: Batch) -> torch.cuda.CUDAGraph | None:
        """The captured step for a batch whose prompts have been read; None and a note where capturing fails."""
        if batch.greedy not in self.graphs:
            state = [batch.column, batch.tokens, batch.done]
            before = [tensor.clone() for tensor in state]
            try:
                self.graphs[batch.greedy] = self._capture(batch)
            except torch.OutOfMemoryError:
                raise  # the eager step needs as much memory
            except RuntimeError as error:
                self.use_graph, self.batch, self.graphs = False, None, {}
                note(f"completions are made without a CUDA graph, which is slower: {first_line(error)}")
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        return self.graphs.get(batch.greedy)

    def _capture(self, batch: Batch) -> torch.cuda.CUDAGraph:
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        before, side = torch.cuda.current_stream(self.device), self._side
        # the graphs share their memory, because they never run at the same time
        pool = next((graph.pool() for graph in self.graphs.values()), None) or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.random.fork_rng([self.device]):  # a resumed run captures at another time, but must draw the same
            try:
                side.wait_stream(before)
                with torch.cuda.stream(side):  # a capture needs a warm-up on another stream
                    for _ in range(WARM_UP):
                        self.step(batch)
                before.wait_stream(side)
                # thread_local, so that NCCL's own thread may go on
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    self.step(batch)
            except RuntimeError:
                # PyTorch's allocator still believes in a capture, and would not free its cache when memory runs out
                with contextlib.suppress(RuntimeError):  # the pool had not begun, or has ended
                    torch._C._cuda_endAllocateToPool(self.device.index, pool)
                    torch._C._cuda_releasePool(self.device.index, pool)
                raise
            finally:
                torch.cuda.set_stream(before)  # after a failed capture PyTorch stays on the side stream
        return graph


class PlainSampler(Sampler):
    """The same through `model.generate`, for what `why_not` names. `stream` has all tokens at once."""

    def _decode(
        self,
        prompt_ids: list[list[int]],
        new: int,
        temperature: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        # every value is given, because the model's generation_config.json sets those that are not
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        config = GenerationConfig(
            **(sampling if temperature else {"do_sample": False}),
            repetition_penalty=1.0,
            max_new_tokens=new,
            eos_token_id=self.eos,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
        )
        device, width = self.model.device, max(map(len, prompt_ids))
        check_positions(self.model, "the model", prompt=width, MAX_COMPLETION_TOKENS=new)
        padded = self.tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(device)
        training = self.model.training
        self.model.eval()  # in training mode gradient checkpointing switches the cache off
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            completions = self.model.generate(**padded, generation_config=config)[:, width:]
        self.model.train(training)
        for count in range(1, completions.shape[1] + 1):
            yield completions[:, :count]


def make_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    autocast: torch.dtype | None = None,
    args: TrainingArguments | None = None,
) -> Sampler:
    """A Sampler where it covers the model and the training run of `args`, else a PlainSampler and a note why."""
    reason = why_not(model, args)
    if reason:
        note(f"completions are made by model.generate, which is slower: {reason}")
    return (PlainSampler if reason else Sampler)(model, tokenizer, autocast)


class Rollout:
    """What GRPOTrainer calls for completions: `GRPOTrainer(rollout_func=Rollout())`. `sampler` fits any trainer.

    Args:
        fast: use the loop above where it covers the run; False leaves everything to `model.generate`.

    `tokens` and `seconds` count what this process has generated, and for how long.
    """

    def __init__(self, fast: bool = True) -> None:
        self.fast = fast
        self.tokens, self.seconds = 0, 0.0
        self._sampler: Sampler | None = None

    def sampler(self, trainer: Trainer) -> Sampler:
        """The sampler of this trainer's policy. Training and evaluation share it, and with it its memory."""
        if self._sampler is None:
            model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            of_run = model, trainer.processing_class, torch.bfloat16 if trainer.args.bf16 else None
            self._sampler = make_sampler(*of_run, trainer.args) if self.fast else PlainSampler(*of_run)
            self._sampler.beside_training = True
        return self._sampler

    def __call__(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list | None]:
        """One completion for each of `prompts`, among which each prompt stands `num_generations` times."""
        start = time.perf_counter()
        distinct = {str(prompt): prompt for prompt in prompts}
        ids = dict(zip(distinct, encode(trainer.processing_class, list(distinct.values())), strict=True))
        prompt_ids = [ids[str(prompt)] for prompt in prompts]
        sampler = self.sampler(trainer)
        if isinstance(sampler, PlainSampler):  # TRL's own path, which knows every setting
            completion_ids, _ = trainer._generate_single_turn(prompt_ids, None, {}, trainer.num_generations)
        else:
            completion_ids = sampler.generate(prompt_ids, trainer.max_completion_length, trainer.temperature)
        self.tokens += sum(map(len, completion_ids))
        self.seconds += time.perf_counter() - start  # the completions are on the host, so the GPU is done
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}
