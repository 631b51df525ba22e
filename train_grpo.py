"""Teach a small Chinese model to reason about school mathematics: GRPO with five rule-based rewards on one GPU.

The R1 recipe (arXiv 2501.12948, GRPO: arXiv 2402.03300) as one flat file: edit the constants, run it, watch
`tensorboard --logdir output`. Where it departs from the tutorial that it grew from, and why: README.md.

    python train_grpo.py           # one CUDA GPU, Qwen2.5-0.5B-Instruct, Chinese GSM8K
    python train_grpo.py --demo    # any laptop, no network: a tiny model learns the same way in minutes
"""

import argparse
import os
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from console import UserError, refuse_missing_folder, run
from prompts import drop_long, load_questions
from rewards import REWARD_WEIGHTS, REWARDS

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before any of these libraries is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks helps nobody here
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)  # what these libraries tell each other about renamed options

# ----------------------------------------------------------------------------------------------------- the recipe
# The model and the questions
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id or folder; --model
DATASET = "swulling/gsm8k_chinese"  # hub id or folder with splits train and test; --dataset
OUTPUT_DIR = "output"  # --output
SEED = 42  # weights of a new adapter, order of the questions, sampling; --seed

# One optimizer step
QUESTIONS_PER_STEP = 32  # distinct questions
COMPLETIONS_PER_QUESTION = 8  # the group: its mean is the baseline of every completion in it
MICRO_BATCH = 8  # completions per forward and GPU; halve it if out of memory, the step stays the same
GRADIENT_CHECKPOINTING = True  # False spares a fifth of the arithmetic, takes 1.6 MiB more per token of a micro batch
LEARNING_RATE = 1e-6  # peak; the tutorial's 5e-6 went wrong at about step 200
WARMUP_STEPS = 10  # then cosine to zero
ADAM_BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
EPOCHS = 1  # passes over the training questions
MAX_STEPS = -1  # optimizer steps, -1: all of EPOCHS; --max-steps

# GRPO
BETA = 0.001  # weight of the KL term to the untrained model; 0 saves that model's memory and forward
LOSS_TYPE = "dapo"  # every token counts the same, in a long completion or a short one (arXiv 2503.14476)
SCALE_REWARDS = "batch"  # whose deviation divides advantages; "group" blows up groups that differ in format only

# Completions
MAX_PROMPT_TOKENS = 256  # longer training questions are dropped
MAX_COMPLETION_TOKENS = 512  # at 256 more than half of this model's answers are cut off
TEMPERATURE = 1.0  # 1 is on-policy: what is sampled is what is trained
TOP_P = 1.0  # set here, since the model's own generation_config.json would narrow sampling
TOP_K = 0
REPETITION_PENALTY = 1.0
FAST_ROLLOUT = True  # the decode loop of rollout.py; False: TRL's own generation, slower
USE_VLLM = False  # vLLM instead, on the same GPU: pip install vllm==0.30.0

# LoRA
USE_LORA = False  # True trains an adapter only: no optimizer state for the whole model
LORA_RANK = 16
LORA_ALPHA = 32
LORA_DROPOUT = 0.0
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_LEARNING_RATE = 1e-5  # an adapter wants about ten times the rate of the whole model

# Saving and watching
SAVE_EVERY = 25  # steps
SAVE_LIMIT = 3  # checkpoints kept; one of the 0.5B model is about 6 GB with its optimizer
LOG_EVERY = 1  # steps
SAMPLE_EVERY = 10  # steps between two completions shown in full
EVAL_EVERY = 25  # steps between two looks at held-out accuracy; a new best is saved at once
EVAL_QUESTIONS = 200  # test questions, always the same, answered at each look: 3.5 points standard error
EVAL_BATCH = 128  # questions answered at a time, greedily
PROBE_QUESTION = "5分钟多少秒"  # the question that the tutorial's model got wrong


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """How this run goes; what the experiment is stands in the constants above."""
    parser = argparse.ArgumentParser(description="GRPO on Chinese GSM8K", allow_abbrev=False)
    parser.add_argument("--model", help=f"hub id or folder (default: {MODEL})")
    parser.add_argument("--dataset", help=f"hub id or folder (default: {DATASET})")
    parser.add_argument("--output", help=f"where this run writes (default: {OUTPUT_DIR}, the demo: {OUTPUT_DIR}/demo)")
    parser.add_argument("--max-steps", type=int, help="stop after so many optimizer steps")
    parser.add_argument("--seed", type=int, help=f"another seed (default: {SEED})")
    parser.add_argument("--resume", action="store_true", help="continue the newest complete checkpoint in the output")
    parser.add_argument("--force-recipe", action="store_true", help="with --resume: although the recipe has changed")
    parser.add_argument("--demo", action="store_true", help="a tiny model on made problems: minutes, any machine")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU (very slow, except for the demo)")
    flags = parser.parse_args(argv)
    if flags.force_recipe and not flags.resume:
        parser.error("--force-recipe goes with --resume")
    return flags


def make_recipe(flags: argparse.Namespace) -> SimpleNamespace:
    """The constants of this file, the demo's own where it is the demo, and the flags on top."""
    recipe = {name: value for name, value in globals().items() if name.isupper() and name != "REWARDS"}
    if flags.demo:
        from demo import RECIPE

        recipe |= RECIPE
    given = {"MODEL": flags.model, "DATASET": flags.dataset, "OUTPUT_DIR": flags.output}
    given |= {"MAX_STEPS": flags.max_steps, "SEED": flags.seed}
    return SimpleNamespace(**recipe | {name: value for name, value in given.items() if value is not None})


def accumulation_steps(recipe: SimpleNamespace, processes: int) -> int:
    """Forward passes per optimizer step and process, so that any number of GPUs trains on the same step.

    Raises:
        UserError: the completions of a step do not divide into the micro batches of all processes.
    """
    completions, at_once = recipe.QUESTIONS_PER_STEP * recipe.COMPLETIONS_PER_QUESTION, recipe.MICRO_BATCH * processes
    if completions % at_once:
        raise UserError(
            f"QUESTIONS_PER_STEP {recipe.QUESTIONS_PER_STEP} x COMPLETIONS_PER_QUESTION "
            f"{recipe.COMPLETIONS_PER_QUESTION} = {completions} completions a step cannot be split into MICRO_BATCH "
            f"{recipe.MICRO_BATCH} on {processes} process(es); change one so that {at_once} divides it"
        )
    return completions // at_once


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    recipe = make_recipe(flags)
    output = Path(recipe.OUTPUT_DIR)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by accelerate launch and torchrun
    main_process = os.environ.get("RANK", "0") == "0"

    # ---- what can be refused is refused before anything is loaded or written
    from accuracy import report
    from models import encode, load_model, pick_device

    device, autocast = pick_device(flags.cpu)
    if device.type == "cpu" and not (flags.demo or flags.cpu):
        raise UserError(
            "no CUDA GPU found (no driver, or a torch built without CUDA?); "
            "--demo trains a tiny model on any machine, --cpu trains this one, very slowly"
        )
    import torch

    import checkpoints

    if flags.demo and device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), 2))  # a tiny model has work for two; more only wait
    checkpoints.check_constants(recipe)
    for given in filter(None, (flags.model, flags.dataset)):
        refuse_missing_folder(given)
    accumulation = accumulation_steps(recipe, processes)

    def prepare() -> tuple[Path | None, str, str]:
        """Look into the output folder and make the demo's base: one process does it for all."""
        checkpoint = checkpoints.newest_checkpoint(output) if flags.resume else checkpoints.claim(output)
        if flags.demo:
            import demo

            model_folder, data_folder = demo.make_demo(output / "base")
            recipe.MODEL, recipe.DATASET = flags.model or model_folder, flags.dataset or data_folder
        if flags.resume:
            checkpoints.check_recipe(output, recipe, checkpoint, flags.force_recipe)
        return checkpoint, recipe.MODEL, recipe.DATASET

    checkpoint, recipe.MODEL, recipe.DATASET = checkpoints.once(prepare, cpu=device.type == "cpu")

    # ---- data
    train, test = load_questions(recipe.DATASET, "train"), load_questions(recipe.DATASET, "test")
    model, tokenizer = load_model(recipe.MODEL)
    lengths = [len(ids) for ids in encode(tokenizer, list(train["prompt"]))]
    fitting = drop_long(train, lengths, recipe.MAX_PROMPT_TOKENS, recipe.QUESTIONS_PER_STEP)

    # ---- trainer
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOConfig

    from monitor import Monitor
    from rollout import Rollout
    from trainer import CarefulTrainer

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.LORA_RANK,
        lora_alpha=recipe.LORA_ALPHA,
        lora_dropout=recipe.LORA_DROPOUT,
        target_modules=recipe.LORA_MODULES,
    )
    config = GRPOConfig(
        output_dir=str(output),
        seed=recipe.SEED,
        use_cpu=device.type == "cpu",
        bf16=autocast is not None,
        per_device_train_batch_size=recipe.MICRO_BATCH,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=recipe.GRADIENT_CHECKPOINTING,
        learning_rate=recipe.LORA_LEARNING_RATE if recipe.USE_LORA else recipe.LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.WARMUP_STEPS,
        adam_beta1=recipe.ADAM_BETAS[0],
        adam_beta2=recipe.ADAM_BETAS[1],
        weight_decay=recipe.WEIGHT_DECAY,
        max_grad_norm=recipe.MAX_GRAD_NORM,
        num_train_epochs=recipe.EPOCHS,
        max_steps=recipe.MAX_STEPS,
        num_generations=recipe.COMPLETIONS_PER_QUESTION,
        max_completion_length=recipe.MAX_COMPLETION_TOKENS,
        temperature=recipe.TEMPERATURE,
        top_p=recipe.TOP_P,
        top_k=recipe.TOP_K,
        repetition_penalty=recipe.REPETITION_PENALTY,
        beta=recipe.BETA,
        loss_type=recipe.LOSS_TYPE,
        scale_rewards=recipe.SCALE_REWARDS,
        use_vllm=recipe.USE_VLLM,
        vllm_mode="colocate",
        reward_weights=REWARD_WEIGHTS,
        save_steps=recipe.SAVE_EVERY,
        save_total_limit=recipe.SAVE_LIMIT,
        logging_steps=recipe.LOG_EVERY,
        logging_nan_inf_filter=False,  # a loss that is not finite has to be seen
        ddp_find_unused_parameters=False,  # every parameter takes part in every step
        report_to="none",  # the monitor writes TensorBoard's curves
        disable_tqdm=True,  # and the console's lines
    )
    config._n_gpu = min(config.n_gpu, 1)  # without a launcher: one GPU, not DataParallel, which TRL refuses
    rollout, monitor = Rollout(recipe.FAST_ROLLOUT), Monitor(recipe, test)
    trainer = CarefulTrainer(
        model=model,
        reward_funcs=REWARDS,
        args=config,
        train_dataset=fitting,
        processing_class=tokenizer,
        callbacks=[monitor],
        peft_config=lora if recipe.USE_LORA else None,
        rollout_func=None if recipe.USE_VLLM else rollout,
    )
    trainer.remove_callback(PrinterCallback)  # it would print thirty keys a step
    monitor.watch(trainer, rollout)
    checkpoints.check_disk(output, trainer.model, recipe.SAVE_LIMIT)

    # ---- before
    memory_advice = partial(checkpoints.memory_advice, recipe, trainer.model, processes)
    measure = memory_advice()(lambda title: report(rollout.sampler(trainer), tokenizer, test, recipe, title))
    results = checkpoints.read_results(output) if flags.resume else {}
    results.pop("finished", None)  # comes last in the file and in the summary
    if main_process:
        monitor.print_header(recipe, device, autocast, processes, len(fitting), len(train) - len(fitting), len(test))
        if not flags.resume:
            checkpoints.save_recipe(output, recipe)
        if "before" not in results:
            before, text = measure("before")
            results = {"model": recipe.MODEL, "dataset": recipe.DATASET, "seed": recipe.SEED, "before": before}
            results["probe"] = {"question": recipe.PROBE_QUESTION, "before": text}
        checkpoints.write_json(output / "results.json", results | {"finished": False})

    with memory_advice(), checkpoints.StopSignals(trainer) as stop:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if stop.signal:
        stop.leave(output, results | monitor.results())

    # ---- save, after
    checkpoints.save_trained(trainer, output)
    if main_process:
        results["after"], results["probe"]["after"] = measure("after")
        results |= monitor.results() | {"finished": True}
        checkpoints.write_json(output / "results.json", results)
        monitor.print_summary(results)


if __name__ == "__main__":
    run(main)
