"""GRPOTrainer whose checkpoints are whole or not there, and which trains on where one cannot be saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer

from checkpoints import attempt, checkpoint_bytes, list_checkpoints, publish
from console import UserError


class CarefulTrainer(GRPOTrainer):
    """GRPOTrainer whose checkpoints are whole or not there, and which goes on where one cannot be saved.

    Raises:
        UserError: weights that are sharded over the processes.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():  # the main process alone evaluates, and would hang
            raise UserError(
                "FSDP and DeepSpeed ZeRO-3 shard the weights, which evaluation here cannot gather; a model of this "
                "size fits every GPU: launch without them, or with ZeRO-1 or -2"
            )

    def _save_checkpoint(self, model, trial) -> None:
        # Trainer's own version has all processes meet half-way, where one whose disk is full never arrives
        self.store_flos()  # a sum over all processes
        output = Path(self.args.output_dir)
        final = output / f"checkpoint-{self.state.global_step}"
        temporary = output / f".tmp-{final.name}"
        faults = [fault for fault in gather_object([attempt(self._write, temporary)]) if fault]  # all have written
        if not self.args.should_save:
            return
        fault = faults[0] if faults else attempt(publish, temporary, final)
        if fault is None:
            best = self.state.best_global_step and str(output / f"checkpoint-{self.state.best_global_step}")
            rotate_checkpoints(str(output), self.args.save_total_limit, best)  # a kill in it damages old ones only
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = ", ".join(path.name for path in list_checkpoints(output)) or "none"
            print(f"WARNING: {final.name} could not be saved ({fault}); kept: {kept}. Training goes on", flush=True)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        card, source = Path(self.args.output_dir, "README.md"), self.model.config._name_or_path
        if self.args.should_save:  # TRL knows no name for a model that came from a folder
            text = card.read_text(encoding="utf-8")
            card.write_text(text.replace("[None](https://huggingface.co/None)", f"`{source}`"), encoding="utf-8")

    def _write(self, folder: Path) -> None:
        """Everything that resuming needs; each process writes its random state, the main one the rest."""
        if self.args.should_save:
            needed, free = checkpoint_bytes(self.model)[0], shutil.disk_usage(self.args.output_dir).free
            if free < needed:
                raise OSError(f"{free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed")
            self.create_model_card(model_name=Path(self.args.output_dir).name)
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        check_fits(Path(resume_from_checkpoint), self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # a run killed after its last step would make one more
            super()._run_epoch(**kwargs)


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
