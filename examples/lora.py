"""LoRA on a sparse model, merged without losing a zero.

A small language model is made 90 % sparse while it learns Moby-Dick and presidents' speeches, then
adapted to upper case by LoRA, twice: as PEFT does it, and with the zeros kept. What the adapters
have learned is merged into the sparse weights, and measured.

    python examples/lora.py [OUT]

Needs PEFT: pip install -c constraints.txt ".[examples]"
"""

import copy
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hamcli import HAMFactory, SparsityCallback
from hamcli.integration.lora import keep_zeros, merge_keeping_zeros
from hamcli.sparsity.targets import Targets, select_targets

LENGTH, TARGET = 64, 0.9


def rows(first: int, count: int, *, upper: bool = False) -> list[dict[str, list[int]]]:
    """Pieces of `LENGTH` bytes; a byte is a token."""
    text = files("hamcli.samples").joinpath("english.txt").read_bytes()
    text = text.upper() if upper else text
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


def make_trainer(model: nn.Module, out: Path, *, steps: int, lr: float, **given: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    evaluated = rows(4000, 64, upper=True)
    return Trainer(model, arguments, eval_dataset=evaluated, **given)


def count_zeros(targets: Targets) -> int:
    return sum(int((param == 0).sum()) for param in targets.params)


def adapt(sparse: LlamaForCausalLM, config: LoraConfig, out: Path) -> LlamaForCausalLM:
    """Train LoRA on upper case and merge it; the zeros of the base model stay."""
    set_seed(1)
    adapted = get_peft_model(copy.deepcopy(sparse), config)
    data = rows(2000, 2000, upper=True)
    trainer = make_trainer(adapted, out, steps=80, lr=1e-2, train_dataset=data)
    trainer.train()
    trained = trainer.evaluate()["eval_loss"]
    merged = merge_keeping_zeros(adapted)
    after = make_trainer(merged, out, steps=1, lr=0.0).evaluate()["eval_loss"]
    print(f"upper case: loss {trained:.4f} with the adapter, {after:.4f} merged")
    return merged


def main(out: Path) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    set_seed(0)
    sparse = make_model()
    trainer = make_trainer(
        sparse,
        out,
        steps=120,
        lr=3e-3,
        train_dataset=rows(0, 2000),
        optimizer_cls_and_kwargs=(HAMFactory, {"lr": 3e-3}),
        callbacks=[SparsityCallback(TARGET)],
    )
    trainer.train()
    targets = select_targets(sparse, include=["*"], exclude=None)
    zeros = count_zeros(targets)
    print(f"{zeros} zeros of {targets.total} weights in the sparse model")
    print(f"upper case: loss {trainer.evaluate()['eval_loss']:.4f} before adapting")

    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    print("LoRA as PEFT has it:")
    adapt(sparse, LoraConfig(**settings), out)
    print("LoRA with keep_zeros:")
    merged = adapt(sparse, keep_zeros(LoraConfig(**settings)), out)

    merged.save_pretrained(out / "model")
    pairs = zip(targets, select_targets(merged, include=["*"], exclude=None), strict=True)
    lost = sum(int(((old.param == 0) & (new.param != 0)).sum()) for old, new in pairs)
    print(f"{lost} of {zeros} zeros lost by the merge, in {out}/model")
    return sparse, merged


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
