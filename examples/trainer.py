"""HAM and exact zeros in transformers' Trainer: an optimizer factory and a callback.

A small causal language model learns the bytes of the built-in English sample from scratch while
80 % of its weights become zero. The Trainer keeps its schedule, clipping, accumulation, evaluation
and checkpoints; the best model is one of those with all zeros.

    python examples/trainer.py [OUT]
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hamcli import HAMFactory, SparsityCallback

STEPS, LENGTH, LR, TARGET = 120, 64, 3e-3, 0.8


def rows(first: int, count: int) -> list[dict[str, list[int]]]:
    """Pieces of `LENGTH` bytes; a byte is a token."""
    text = files("hamcli.samples").joinpath("english.txt").read_bytes()
    pieces = [text[at * LENGTH : (at + 1) * LENGTH] for at in range(first, first + count)]
    return [{"input_ids": list(piece), "labels": list(piece)} for piece in pieces]


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def main(out: Path) -> LlamaForCausalLM:
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_grad_norm=1.0,  # HAM sees the clipped gradients
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        dataloader_pin_memory=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    callback = SparsityCallback(TARGET)
    trainer = Trainer(
        make_model(),
        arguments,
        train_dataset=rows(0, 2000),
        eval_dataset=rows(2000, 32),
        optimizer_cls_and_kwargs=(HAMFactory, {"lr": LR, "weight_decay": 0.01}),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model(str(out / "model"))

    best, final = trainer.state.best_global_step, callback.sparsifier.last_update
    total, tensors = callback.targets.total, len(callback.targets)
    print(f"best step {best}, of those from step {final} on")
    print(f"{callback.num_zeros()} zeros of {total} weights in {tensors} tensors, in {out}/model")
    return trainer.model


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
