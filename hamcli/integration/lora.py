"""LoRA on a sparse model, merged without losing a zero.

LoRA adds scaling * B @ A to a frozen weight W (Hu et al., arXiv 2106.09685). The product is dense:
merged as it is, every zero of W is gone, and with masks put over the merged weights most of what
was learned. Here the sum that is trained is the one that is merged:

    W + mask * (scaling * B @ A),  mask = (W != 0)

The mask is read from the frozen weights, so adapters are saved, loaded and shared as ever. The
product is formed in each forward pass: time of a multiplication [out, r] x [r, in], and memory of
one weight of each adapted layer for the backward pass.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from hamcli.errors import UsageError


def keep_zeros(config: LoraConfig) -> LoraConfig:
    """Have this LoRA train only weights that are not zero in the base model.

    For `get_peft_model`, `PeftModel.from_pretrained(..., config=...)` and trainers that take a
    `peft_config`. Acts on the `nn.Linear` layers that the configuration adapts.

    Args:
        config: Plain LoRA, with dropout, rank-stabilised scaling or bias if wanted; changed, and
            returned. A variant such as DoRA is refused by `get_peft_model` (UsageError E116): its
            change of a weight is not this sum. So is a start that changes the base weight, as
            PiSSA's and OLoRA's: the zeros would be gone before the first step.

    """
    # PEFT's own way of giving a layer type a LoRA of its own; experimental there
    config._register_custom_module({nn.Linear: MaskedLinear})
    return config


@torch.no_grad()
def merge_keeping_zeros(model: PeftModel) -> nn.Module:
    """Merge the active adapters into the base model and put its zeros back.

    After training with `keep_zeros` the merged model computes what was trained. An adapter that was
    trained without it loses what it wrote into zeros: measure the merged model.

    Args:
        model: A PEFT model whose adapters are LoRA and are not merged yet; used up.

    Returns:
        The base model without adapters. Every weight of an adapted layer that was zero is +0.0.

    Raises:
        UsageError: E116, an adapter is merged already: which weights were zero is lost.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if any(layer.merged for layer in layers):
        raise _unfit("adapters are merged already", "unmerge_adapter() first")
    held = [_base_weight(layer) for layer in layers]
    masks = [weight != 0 for weight in held]
    merged = model.merge_and_unload()
    for weight, mask in zip(held, masks, strict=True):
        # where, not a product: 0 * nan is nan, and -w * 0 stores -0.0
        weight.copy_(torch.where(mask, weight, 0.0))
    assert isinstance(merged, nn.Module)
    return merged


class MaskedLinear(Linear):  # type: ignore[misc,unused-ignore]  # Any to mypy without PEFT
    """PEFT's LoRA of `nn.Linear`, whose product is masked by the zeros of the base weight."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            UsageError: E116, it is no plain LoRA, or begins by changing zeros of the base weight.
        """
        weight = _base_weight(self)
        before = weight.detach().clone()
        super().update_layer(adapter_name, *args, **kwargs)
        if adapter_name in self.lora_variant:
            name = type(self.lora_variant[adapter_name]).__name__
            raise _unfit(f"{name} is another sum", "plain LoRA")
        # PiSSA and OLoRA take the adapter's first product out of the weight, zeros and all
        if not weight.is_meta and not torch.equal(weight == 0, before == 0):
            weight.data = before
            raise _unfit(
                "the adapter begins by writing into zeros of the base weight",
                "init_lora_weights=True",
            )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, [out, in]; zero where the weight is zero."""
        delta: Tensor = super().get_delta_weight(adapter)
        return torch.where(_base_weight(self) != 0, delta, 0.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus that of the masked products of the active adapters.

        Args:
            x: [..., in].
            *args: For the base layer.
            **kwargs: For the base layer.

        Raises:
            UsageError: E116, other adapters for each row of the batch are asked for.
        """
        if self.disable_adapters or self.merged:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        if kwargs.get("adapter_names") is not None:
            raise _unfit("one batch mixes adapters", "set_adapter")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            delta = self.get_delta_weight(adapter)
            seen = self._cast_input_dtype(x, delta.dtype)
            bias = self.lora_B[adapter].bias
            result = result + linear(
                self.lora_dropout[adapter](seen),
                delta,
                None if bias is None else bias * self.scaling[adapter],
            )
        return result.to(dtype)


def _base_weight(layer: LoraLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


def _unfit(why: str, right: str) -> UsageError:
    return UsageError("E116", "LoRA does not keep the zeros", "", why, right)
