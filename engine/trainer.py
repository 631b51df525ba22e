"""TRL's trainers with two changes: no wasted columns or rows in GRPO's, and in both of them whole checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from trl import GRPOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler

from engine import packing
from engine.checkpoints import checkpoint_bytes, failure_of, list_checkpoints, open_weights, publish, rotate
from engine.console import UserError, note
from engine.lora import lower_frozen

CPU_TILE = 1024  # columns of logits that TRL's LM head computes at a time on a CPU, so that a tile stays in its caches


@contextmanager
def lean_lm_head(device: torch.device, labelled_only: bool = True) -> Iterator[None]:
    """Within it TRL's LM head, which at a vocabulary of 150,000 was 40 % of a CPU's work, computes the same with less.

    On CUDA it has a kernel of its own. Elsewhere it computes tiles of 32,768 columns, each operation on 200 MB, and
    projects all positions, prompts and padding included, because some devices compile for every new shape. A CPU does
    not. Left at once, so that nobody else's training (the demo's base) rounds another way.

    Args:
        labelled_only: project the labelled positions only; False leaves the rounding as TRL's.
    """
    utils = trl.trainer.utils
    before = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    if labelled_only:
        utils._use_triton = lambda device: True  # which decides only this there; the kernels ask for themselves
    if device.type == "cpu":
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE
    try:
        yield
    finally:
        utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it TRL's LM head multiplies bf16 numbers for its gradients on a CPU's units for bf16, and adds in float32.

    TRL casts them to float32 first, so that no sum is rounded to bf16. The product of two bf16 numbers is exact in
    float32, so oneDNN may take them for bf16 again: the same sums in another order, 2.5 times as fast.
    """
    kernels, theirs = trl.kernels.chunked_logprob, trl.kernels.chunked_logprob._addmm_fp32

    def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.device.type != "cpu" or not a.dtype == b.dtype == torch.bfloat16:
            return theirs(total, a, b)
        settings = torch.backends.mkldnn.matmul
        before, settings.fp32_precision = settings.fp32_precision, "bf16"
        total.addmm_(a.float(), b.float())
        settings.fp32_precision = before

    kernels._addmm_fp32 = add_product
    try:
        yield
    finally:
        kernels._addmm_fp32 = theirs


class AtomicCheckpoints:
    """What makes the checkpoints of any of TRL's trainers whole or not there: `class Mine(AtomicCheckpoints, Theirs)`.

    All that it overrides is transformers.Trainer's own. A checkpoint that cannot be saved costs a line on the console,
    not the run.

    Raises:
        UserError: a launcher that shards the weights over the processes, or casts them.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # FSDP and ZeRO-3 shard the weights, and the main process, which alone evaluates, would hang; ZeRO-1 and
            # -2 cast them to bf16, where updates of 1e-6 vanish
            raise UserError("FSDP and DeepSpeed are not supported; a model of this size fits every GPU without them")
        if self.args.bf16:
            lower_frozen(self.model, torch.bfloat16)

    def _save_checkpoint(self, model, trial) -> None:
        # Trainer's own version has all processes meet half-way, where one whose disk is full never arrives
        self.store_flos()  # a sum over all processes
        output = Path(self.args.output_dir)
        final = output / f"checkpoint-{self.state.global_step}"
        temporary = output / f".tmp-{final.name}"
        faults = [fault for fault in gather_object([failure_of(self._write, temporary)]) if fault]  # all have written
        if not self.args.should_save:
            return
        fault = faults[0] if faults else failure_of(publish, temporary, final)
        if fault is None:
            rotate(output, self.args.save_total_limit, self.state.best_global_step)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = ", ".join(path.name for path in list_checkpoints(output)) or "none"
            print(f"WARNING: {final.name} could not be saved ({fault}); kept: {kept}. Training goes on", flush=True)

    def _write(self, folder: Path) -> None:
        """Everything that resuming needs; each process writes its random state, the main one the rest."""
        if self.args.should_save:
            needed, free = checkpoint_bytes(self.model)[0], shutil.disk_usage(self.args.output_dir).free
            if free < needed:
                raise OSError(f"{free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed")
        self.save_model(str(folder), _internal_call=True)
        self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)  # an adapter comes without
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))
            open_weights(folder, folder / "trainer_state.json")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        check_fits(Path(resume_from_checkpoint), self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # A checkpoint brings its learning rate, betas and weight decay along; what the constants say now shall hold.
        today = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        schedule.base_lrs = [group["initial_lr"] for group in today]
        for group, now, share in zip(self.optimizer.param_groups, today, schedule.lr_lambdas, strict=True):
            group |= {name: now[name] for name in ("initial_lr", "betas", "weight_decay")}
            group["lr"] = now["initial_lr"] * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # a run killed after its last step would make one more
            super()._run_epoch(**kwargs)


class LeanGRPOTrainer(AtomicCheckpoints, GRPOTrainer):
    """GRPOTrainer that computes no wasted columns or rows, and whose checkpoints are whole or not there.

    TRL pads prompts and completions to the longest of the generation batch and trains on all of that in every micro
    batch (huggingface/trl issue #7179). Here the gradient is the same, and less is computed for it:

    - share: the completions of a group stand behind one copy of their prompt (packing.py);
    - trim: a micro batch is as wide as its longest pack, prompt and completions together;
    - sort: whole groups, or rows of like length, come into one micro batch;
    - skip: a completion whose advantage is 0, as in a group of equal rewards, has no gradient and is not run.

    There is no public way to do this, so three private methods of TRL are overridden. A fourth makes the order of the
    questions in each pass the same whether the run was resumed or not.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        reason = packing.why_not(model)
        self.shares_prompts, self.pair_cost = reason is None, 0.0 if reason else packing.pair_cost(model)
        if reason:
            note(f"each completion reads its prompt by itself, slower: {reason}")

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        with exact_products():  # of the backward pass
            return super().training_step(*args, **kwargs)

    def _get_train_sampler(self, dataset=None) -> RepeatSampler:
        self._question_sampler = super()._get_train_sampler(dataset)
        return self._question_sampler

    def _run_epoch(self, epoch: int, **kwargs) -> None:
        # The sampler draws one order after the other from a generator that a resumed process starts again at the first.
        # It gets no `set_epoch`: accelerate does not reach it on several processes once batches are skipped.
        if (sampler := self._question_sampler).shuffle:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(epoch):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probabilities and entropies of the completions' tokens; the policy, old and reference passes use it.

        Args:
            input_ids, attention_mask: [rows, columns], prompts padded on the left, completions on the right.
            logits_to_keep: the last so many columns hold the completions.
            batch_size: rows at a time; all at once where not given.
            others: what this project never asks for (a router's loss); a call with any of it is left to TRL.

        Returns:
            Log-probabilities and (or None) entropies, [rows, logits_to_keep], 0 where masked; None.
        """
        if any(value is not None and value is not False for value in others.values()):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
        prompt_columns = input_ids.size(1) - logits_to_keep
        rows = packing.read_rows(input_ids, attention_mask, prompt_columns)
        logps = torch.zeros(len(rows), logits_to_keep, device=input_ids.device)
        entropies = torch.zeros_like(logps)
        live = [row for row in rows if row.length > 0]
        if not live:  # a pass without the model would leave no gradients: two tokens of the first row
            live = [rows[0]._replace(prompt_length=min(3, prompt_columns))]
        at_once = batch_size or len(live)
        order = packing.arrange(live, at_once, self.pair_cost, self.shares_prompts)
        for chunk in (order[start : start + at_once] for start in range(0, len(order), at_once)):
            packs, _ = packing.plan(chunk, self.pair_cost, self.shares_prompts)
            layout = packing.lay_out(packs, input_ids, prompt_columns)
            shared = {} if layout.mask is None else {"position_ids": layout.positions, "attention_mask": layout.mask}
            with self.accelerator.autocast(), lean_lm_head(input_ids.device):
                outputs = model(input_ids=layout.ids, shift_labels=layout.labels, fused_lm_head=True, **shared)
            logps[tuple(layout.targets)] = outputs.log_probs.flatten()[layout.places]
            if compute_entropy:
                entropies[tuple(layout.targets)] = outputs.entropy.flatten()[layout.places]
        return logps, entropies if compute_entropy else None, None

    def _rows_are_independent(self) -> bool:
        """Whether the gradient is a sum over rows: none depends on the others of its micro batch."""
        whole = self.loss_type == "bnpo" or self.top_entropy_quantile < 1  # a mean, a quantile over the micro batch
        return not (whole or self._entropy_bonus_enabled or self.aux_loss_enabled)

    def _teaches(self, inputs: dict) -> torch.Tensor:
        """Which rows have a gradient, [rows]: without a KL term those whose advantage is not exactly 0."""
        if self.beta == 0 and self._rows_are_independent():
            return inputs["advantages"] != 0
        return torch.ones_like(inputs["advantages"], dtype=torch.bool)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs, parts = super()._prepare_inputs(generation_batch), self._buffered_inputs
        if parts is before or not self._rows_are_independent():
            return inputs
        # New completions, in micro batches: arrange those that share an optimizer step, whatever the two settings are.
        # Rows that teach nothing come first, to be skipped together.
        window = math.gcd(len(parts), self.args.gradient_accumulation_steps)
        for block in (parts[first : first + window] for first in range(0, len(parts), window)):
            batch = {name: torch.cat([part[name] for part in block]) for name, value in block[0].items() if value.ndim}
            ids, mask = (
                torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1) for what in ("ids", "mask")
            )
            rows = packing.read_rows(ids, mask, batch["prompt_ids"].shape[1])
            teaches = self._teaches(batch).tolist()
            dead = [row for row in rows if not teaches[row.index]]
            live = [row for row in rows if teaches[row.index]]
            micro_batch = len(rows) // window
            order = dead + packing.arrange(live, micro_batch, self.pair_cost, self.shares_prompts)
            order = torch.tensor([row.index for row in order], device=ids.device)
            for name, values in batch.items():
                for part, chunk in zip(block, values[order].chunk(window), strict=True):
                    part[name] = chunk  # in place: `inputs` is one of them
        return inputs

    def _compute_loss(self, model, inputs):
        live = self._teaches(inputs)
        alone = self.accelerator.distributed_type == DistributedType.NO  # else all processes have to meet in the model
        if alone and not live.any() and not self.accelerator.sync_gradients:  # the last one makes gradients of zeros
            return torch.zeros((), device=live.device, requires_grad=True)
        # A masked row counts as a row: no loss's divisor changes. Logged entropy and clipping are means over live rows.
        loss = super()._compute_loss(model, inputs | {"completion_mask": inputs["completion_mask"] * live[:, None]})
        if not self.accelerator.gather(live.sum()).any():  # nothing was measured; TRL leaves NaN out of its means
            self._metrics["train"]["entropy"][-1] = math.nan
        return loss


class LeanSFTTrainer(AtomicCheckpoints, SFTTrainer):
    """SFTTrainer whose checkpoints are whole or not there."""

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        with exact_products():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        with lean_lm_head(self.accelerator.device, labelled_only=False):
            return super().compute_loss(*args, **kwargs)


def check_fits(checkpoint: Path, model: torch.nn.Module) -> None:
    """Raises UserError where the weights in `checkpoint` are another model's; Trainer silently loads what it can."""
    adapter = isinstance(model, PeftModel)
    weights = get_peft_model_state_dict(model) if adapter else model.state_dict()
    needed = weights if adapter else dict(model.named_parameters())  # without the second name of a tied weight
    shapes: dict[str, list[int]] = {}
    for file in checkpoint.glob("adapter_model*.safetensors" if adapter else "model*.safetensors"):
        with safe_open(file, "pt") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}
    wrong = [name for name in needed if name not in shapes]
    wrong += [name for name, shape in shapes.items() if name not in weights or shape != list(weights[name].shape)]
    if wrong:
        raise UserError(
            f"{str(checkpoint)!r} was saved from another model ({len(wrong)} of {len(needed)} weights differ, the "
            f"first: {wrong[0]}); resume with the model it was trained from, or start another run with --output"
        )
