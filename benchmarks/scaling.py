"""Memory of each process for language models of 1, 7 and 70 billion weights, as `ham plan` counts.

    python benchmarks/scaling.py

The models are Llamas of the published sizes, built without memory; nothing is trained.
"""

import torch

from hamcli.memory import Memory, memory_of
from hamcli.planning import largest_part
from hamcli.sparsity.targets import select_targets

SIZES = {
    "1 B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "tie_word_embeddings": True},
    "7 B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70 B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
WORLDS = (1, 8, 64)


def planned(shape: dict[str, object], world: int) -> tuple[int, int, Memory]:
    """Parameters, prunable weights and the bytes of each of `world` processes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    parameters = sum(one.numel() for one in model.parameters())
    prunable = select_targets(model, ["*"], None).total
    kind = "fsdp" if world > 1 else "none"
    found = memory_of(
        parameters=parameters, prunable=prunable, largest=largest_part(model), parallel=kind,
        world=world,
    )  # fmt: skip
    return parameters, prunable, found


def main() -> None:
    """Print the table in Markdown: on the device, and of the dense weights on the CPU."""
    print("| model | parameters | prunable | " + " | ".join(map(str, WORLDS)) + " |")
    print("|---" * (3 + len(WORLDS)) + "|")
    for name, shape in SIZES.items():
        cells = []
        for world in WORLDS:
            parameters, prunable, found = planned(shape, world)
            device, host = found.total - found.dense, found.dense
            cells.append(f"{device / 1e9:,.1f} + {host / 1e9:,.1f}")
        print(f"| {name} | {parameters:,} | {prunable:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
