"""TRL's trainers with two changes: GRPO's computes less for the same gradient, and both write atomic checkpoints."""

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

CPU_TILE = 1024  # columns of logits that TRL's LM head computes at a time on a CPU; they fit into its caches


@contextmanager
def lean_lm_head(device: torch.device, labelled_only: bool = True) -> Iterator[None]:
    """Within this context TRL's LM head computes the same with less work, on other devices than CUDA.

    On CUDA TRL has a kernel. Elsewhere it computes tiles of 32,768 columns of logits at a time, for all positions, with
    prompts and padding. With a vocabulary of 150,000 that was 40 % of a CPU's work. With `labelled_only` only positions
    that have a label are computed; False keeps TRL's rounding.
    """
    utils = trl.trainer.utils
    before = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    if labelled_only:
        utils._use_triton = lambda device: True  # decides nothing else there; the kernels have their own
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
    """Makes the checkpoints of a trainer complete or absent: `class Mine(AtomicCheckpoints, GRPOTrainer)`.

    If a checkpoint cannot be saved, one line says so and the run goes on. Only methods of transformers.Trainer are
    overridden. Raises UserError if the launcher uses FSDP or DeepSpeed.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # FSDP and ZeRO-3 shard the weights, so the evaluation in the main process would hang. ZeRO-1 and -2 cast
            # them to bf16, in which updates of 1e-6 vanish.
            raise UserError("FSDP and DeepSpeed are not supported; a model of this size fits every GPU without them")
        if self.args.bf16:
            lower_frozen(self.model, torch.bfloat16)

    def _save_checkpoint(self, model, trial) -> None:
        # In Trainer's version all processes wait for each other half-way, and one whose disk is full never gets there.
        self.store_flos()  # a sum over all processes
        output = Path(self.args.output_dir)
        final = output / f"checkpoint-{self.state.global_step}"
        temporary = output / f".tmp-{final.name}"
        faults = [fault for fault in gather_object([failure_of(self._write, temporary)]) if fault]
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
        """Write everything that resuming needs: each process its random state, the main one the rest."""
        if self.args.should_save:
            needed, free = checkpoint_bytes(self.model)[0], shutil.disk_usage(self.args.output_dir).free
            if free < needed:
                raise OSError(f"{free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed")
        self.save_model(str(folder), _internal_call=True)
        self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)  # PEFT saves none
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))
            open_weights(folder, folder / "trainer_state.json")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # Trainer would load the weights that fit, and leave the others at random numbers.
        adapter = isinstance(self.model, PeftModel)
        weights = get_peft_model_state_dict(self.model) if adapter else self.model.state_dict()
        needed = weights if adapter else dict(self.model.named_parameters())  # here a tied weight has one name only
        shapes: dict[str, list[int]] = {}
        for file in Path(resume_from_checkpoint).glob("*model*.safetensors"):  # model... or adapter_model...
            with safe_open(file, "pt") as stored:
                shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}
        wrong = [name for name in needed if name not in shapes]
        wrong += [name for name, shape in shapes.items() if name not in weights or shape != list(weights[name].shape)]
        if wrong:
            raise UserError(
                f"{resume_from_checkpoint!r} was saved from another model ({len(wrong)} of {len(needed)} weights "
                f"differ, the first: {wrong[0]}); resume with the model it was trained from, or name another --output"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The checkpoint holds the learning rate, betas and weight decay of its time. Those of the constants shall hold.
        today = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        schedule.base_lrs = [group["initial_lr"] for group in today]
        for group, now, share in zip(self.optimizer.param_groups, today, schedule.lr_lambdas, strict=True):
            group |= {name: now[name] for name in ("initial_lr", "betas", "weight_decay")}
            group["lr"] = now["initial_lr"] * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # this is logged

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # else a run killed after its last step would make one more
            super()._run_epoch(**kwargs)


class LeanGRPOTrainer(AtomicCheckpoints, GRPOTrainer):
    """GRPOTrainer that computes the same gradient with less work.

    TRL pads all prompts and completions to the longest of the generation batch, and trains on the padding in every
    micro batch (huggingface/trl issue #7179). Here

    - share: the completions of a group stand behind one copy of their prompt (packing.py);
    - trim: a micro batch is only as wide as its longest pack;
    - sort: whole groups, or rows of like length, form a micro batch;
    - skip: a completion with advantage 0 has no gradient, and is left out.

    TRL has no public interface for this, so private methods are overridden.
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
        # The sampler draws the order of each pass from one generator, which starts anew when a run is resumed: the
        # orders of the earlier passes are drawn again. `set_epoch` would not do: on several processes accelerate does
        # not reach this sampler once batches are skipped.
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
        """Log-probabilities and entropies of the completions' tokens, both [rows, logits_to_keep] and 0 where masked.

        `input_ids` and `attention_mask` are [rows, columns]: prompts, padded on the left, and in the last
        `logits_to_keep` columns completions, padded on the right. TRL's own method is used if any of `others` is set.
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
        if not live:  # the model must run, or there would be no gradients: two tokens of the first row are enough
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
        """Whether the gradient is a sum over rows, none of which depends on the others of its micro batch."""
        over_batch = self.loss_type == "bnpo" or self.top_entropy_quantile < 1  # a mean and a quantile over all rows
        return not (over_batch or self._entropy_bonus_enabled or self.aux_loss_enabled)

    def _teaches(self, inputs: dict) -> torch.Tensor:
        """Which rows have a gradient, [rows]: without a KL term, those whose advantage is not 0."""
        if self.beta == 0 and self._rows_are_independent():
            return inputs["advantages"] != 0
        return torch.ones_like(inputs["advantages"], dtype=torch.bool)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs, parts = super()._prepare_inputs(generation_batch), self._buffered_inputs
        if parts is before or not self._rows_are_independent():
            return inputs
        # New completions, in micro batches. Rearrange the rows that share an optimizer step and a generation. Rows
        # without a gradient come first, and are skipped together.
        window = math.gcd(len(parts), self.args.gradient_accumulation_steps)
        for block in (parts[first : first + window] for first in range(0, len(parts), window)):
            batch = {name: torch.cat([part[name] for part in block]) for name, value in block[0].items() if value.ndim}
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            rows = packing.read_rows(ids, mask, batch["prompt_ids"].shape[1])
            teaches = self._teaches(batch).tolist()
            live = [row for row in rows if teaches[row.index]]
            order = [row for row in rows if not teaches[row.index]]
            order += packing.arrange(live, len(rows) // window, self.pair_cost, self.shares_prompts)
            order = torch.tensor([row.index for row in order], device=ids.device)
            for name, values in batch.items():
                for part, chunk in zip(block, values[order].chunk(window), strict=True):
                    part[name] = chunk  # in place, because `inputs` is one of these parts
        return inputs

    def _compute_loss(self, model, inputs):
        live = self._teaches(inputs)
        alone = self.accelerator.distributed_type == DistributedType.NO  # else all processes must run the model
        # the last micro batch of a step runs in any case, for gradients of zeros
        if alone and not live.any() and not self.accelerator.sync_gradients:
            return torch.zeros((), device=live.device, requires_grad=True)
        # A masked row still counts as a row in the divisor of the loss. Entropy and clipping are logged for live rows.
        loss = super()._compute_loss(model, inputs | {"completion_mask": inputs["completion_mask"] * live[:, None]})
        if not self.accelerator.gather(live.sum()).any():  # no entropy was measured; TRL leaves NaN out of its means
            self._metrics["train"]["entropy"][-1] = math.nan
        return loss


class LeanSFTTrainer(AtomicCheckpoints, SFTTrainer):
    def training_step(self, *args, **kwargs) -> torch.Tensor:
        with exact_products():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        with lean_lm_head(self.accelerator.device, labelled_only=False):
            return super().compute_loss(*args, **kwargs)
