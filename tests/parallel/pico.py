"""A language model of a few thousand weights without dropout, and launches of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.oracles.safetensors_reader import read_file

ALBERT = Path(__file__).parents[1] / "assets" / "rxnmapper-albert-mlm"
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "O=C(O)c1ccccc1", "CCCC", "CNC", "CO",
          "CC(C)Br", "C1CCCCC1", "NCCO", "CCCCl"] * 4  # fmt: skip
QUICK = {
    "training.batch_size": 8,
    "training.checkpoint_every": 100,
    "evaluation.examples": 8,
    "data.max_length": 16,
    "optimizer.max_grad_norm": 1000,
    "optimizer.lr": 0.01,
}


ROOT = Path(__file__).parents[2]


def vocabulary() -> int:
    """Tokens of ALBERT."""
    return int(json.loads((ALBERT / "config.json").read_text())["vocab_size"])


def saved(model_class: Any, config: Any, folder: Path) -> Path:
    """A random model of the class in a folder, with the tokenizer of ALBERT."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ALBERT / name, folder / name)
    return folder


def make_llama(folder: Path, *, tied: bool = False, hidden: int = 32, layers: int = 2) -> Path:
    """A folder with a causal language model over the tokenizer of ALBERT."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return saved(LlamaForCausalLM, config, folder)


def make_gpt2(folder: Path) -> Path:
    """The same of a model whose weights lie as [inputs, outputs], in rows of 20 and 80."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary(),
        n_embd=20,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return saved(GPT2LMHeadModel, config, folder)


def make_data(folder: Path) -> Path:
    """Lines of text, and the model, in one folder."""
    path = folder / "smiles.txt"
    path.write_text("\n".join(SMILES))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    # the workers are modules of the tests, which lie beside an installed package
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    plain = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    plain["PYTHONWARNINGS"] = "error::FutureWarning"  # what torch is about to drop
    return {**os.environ, **plain, "PYTHONPATH": os.pathsep.join(paths)} | more


def torchrun(size: int, *words: object) -> list[str]:
    """The words of a launch on this machine, over the loopback."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *map(str, words),
    ]  # fmt: skip


def torchruns(num_machines: int, *words: object) -> list[list[str]]:
    """The words of a launch on each of several machines, which are this one: a process on each."""
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    one = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(num_machines), *place]
    return [[*one, "--nproc-per-node", "1", *map(str, words)] for _ in range(num_machines)]


def settings(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def sparsify(size: int, cwd: Path, *words: object, code: int = 0, **values: object):
    """`ham sparsify` in `size` processes; the finished process."""
    command = ["-m", "hamcli", "sparsify", *words, *settings(QUICK | values)]
    whole = torchrun(size, *command) if size > 1 else [sys.executable, *map(str, command)]
    done = subprocess.run(
        whole, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done


def report_of(folder: Path):
    return json.loads((folder / "report.json").read_text())


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return read_file(folder / "model.safetensors")


def integers(report):
    """All that is counted."""
    found = {key: report["sparsity"][key] for key in ("zeros", "total", "num_parameters")}
    found["tensors"] = [(one["name"], one["zeros"], one["total"]) for one in report["tensors"]]
    found["histogram"] = report["histogram"]["before"], report["histogram"]["total"]
    return found


def assert_same_masks(first: Path, second: Path) -> float:
    """The zeros lie at the same places; returns the greatest difference of the weights."""
    one, two = weights_of(first), weights_of(second)
    assert one.keys() == two.keys()
    differences = []
    for name, weights in one.items():
        assert ((weights == 0) == (two[name] == 0)).all(), name
        differences.append(float(np.abs(weights - two[name]).max()))
    return max(differences)
