"""HAM's mirror step and exact zeros in a training loop of one's own.

An image classifier of 175,610 parameters learns to imitate its dense self on random images while
90 % of its weights become zero. AdamW takes its step, its post-step hook takes HAM's and masks.

    python examples/plain_torch_loop.py [OUT]
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import ResNetForImageClassification

from hamcli import ham_step_
from hamcli.sparsity.methods import apply_masks_, make_sparsifier
from hamcli.sparsity.targets import select_targets

MODEL = Path(__file__).parents[1] / "tests" / "assets" / "fashion-mnist-resnet-tiny"
STEPS, BATCH, LR, TARGET = 80, 32, 1e-3, 0.9


def main(out: Path) -> ResNetForImageClassification:
    torch.manual_seed(0)
    model = ResNetForImageClassification.from_pretrained(MODEL).train()
    teacher = copy.deepcopy(model).eval().requires_grad_(False)

    targets = select_targets(model, include=["*"], exclude=None)
    sparsifier = make_sparsifier("gradual", targets, target=TARGET, steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def mirror(optimizer: torch.optim.Optimizer, *_: object) -> None:
        # the gradients are still those of the step: this hook runs before zero_grad
        ham_step_(
            targets.params,
            [param.grad for param in targets.params],
            lr=optimizer.param_groups[0]["lr"],
            alpha=1.0,
            beta=1e-3,
            masks=sparsifier.masks,
        )

    optimizer.register_step_post_hook(mirror)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    for step in range(1, STEPS + 1):
        images = torch.randn(BATCH, 1, 28, 28)
        with torch.no_grad():
            wanted = log_softmax(teacher(images).logits, -1)
        found = log_softmax(model(images).logits, -1)
        loss = kl_div(found, wanted, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        masks = sparsifier.masks_due(step)
        if masks is not None:
            apply_masks_(targets, masks)
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step:3}  loss {loss.item():.4f}  sparsity {sparsifier.sparsity:.4f}")

    model.eval().save_pretrained(out)
    zeros = sum(int((param == 0).sum()) for param in targets.params)
    print(f"{zeros} zeros of {targets.total} weights in {len(targets)} tensors, in {out}")
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
