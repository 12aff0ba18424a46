"""A language model of a few thousand weights in a Trainer, on rows made in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hamcli.sparsity.targets import select_targets
from tests.oracles.safetensors_reader import read_folder
from tests.sparsity import pico


def model() -> LlamaForCausalLM:
    return pico.llama()


def rows(count: int = 64) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (count, 8), generator=draw).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(out: Path, *, steps: int = 12, model: Any = None, **given: Any) -> Trainer:
    """A Trainer of 12 steps; words of TrainingArguments and of Trainer mixed."""
    words = ("optimizer_cls_and_kwargs", "optimizers", "callbacks", "compute_metrics")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        **{
            "save_strategy": "no",
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **{key: value for key, value in given.items() if key not in words},
        },
    )
    return Trainer(
        model or pico.llama(),
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(8),
        **{key: value for key, value in given.items() if key in words},
    )


def target_names(model: Any) -> list[str]:
    return select_targets(model, ["*"], None).names


def zeros_in(folder: Path, names: list[str]) -> int:
    """Zeros of the named tensors in the files of a folder."""
    tensors = read_folder(folder)
    return sum(int((tensors[name] == 0).sum()) for name in names)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
