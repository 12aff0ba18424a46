"""How transformers loads a packed folder: a quantisation method, as it calls such things.

transformers reads the packed tensors as flat bytes; an operation in front of its own conversions
unpacks each, so that what follows (merging experts, splitting, tying) sees dense tensors. Without
this module transformers finds flat bytes where it wants matrices, and stops.

Only `registering` imports this module, when transformers itself is being imported.
"""

from typing import Any

from hamcli.checkpoint.packed.folders import METHOD


def register() -> None:
    """Tell transformers of the method, once."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    config_class, quantizer_class = _classes()
    register_quantization_config(METHOD)(config_class)
    register_quantizer(METHOD)(quantizer_class)


def _classes() -> tuple[Any, Any]:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class PackedConfig(QuantizationConfigMixin):
        """What config.json says of a packed folder."""

        def __init__(self, version: int = 1, **_: Any) -> None:
            self.quant_method = METHOD  # type: ignore[assignment]  # its own enumeration is closed
            self.version = version
            # what is loaded is the dense model, and is saved as one
            self.dequantize = True

    class PackedLoader(HfQuantizer):
        """Unpacks tensors while transformers loads them."""

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            """Refuse a version that is not known."""
            version = getattr(self.quantization_config, "version", None)
            if version != 1:
                raise ValueError(f"packed form of version {version}; this ham reads version 1")
            if not self.pre_quantized:
                raise ValueError("a model is packed by `ham export --format packed`, not on load")

        def update_dtype(self, dtype: Any) -> Any:
            """Refuse what transformers makes of packed bytes where config.json names no dtype."""
            if not dtype.is_floating_point:
                raise ValueError('the packed config.json names no dtype: load it with dtype="..."')
            return dtype

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
            """Tell the operation which dtype its packed tensors are to have when unpacked."""
            for operation in getattr(converter, "operations", ()):
                if hasattr(operation, "packed_dtype"):
                    operation.packed_dtype = dtype
            return super().get_new_dtype(converter, param, dtype)

        def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
            """Unpack in front of the model's own conversions, and of every other tensor."""
            return _with_unpacking(weight_conversions, model)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            # its conversions hold ours; without any, saving asks for the model's own again
            model._weight_conversions = None
            return model

        def is_serializable(self) -> bool:
            """The loaded model is dense, and saved as such."""
            return True

        @property
        def is_trainable(self) -> bool:
            """Nothing of the packed form is left."""
            return True

    return PackedConfig, PackedLoader


def _with_unpacking(conversions: Any, model: Any) -> list[Any]:
    from transformers.core_model_loading import WeightConverter

    unpack = _operation()
    made = []
    for one in conversions:
        if isinstance(one, WeightConverter):
            one = one.copy(
                list(one._original_source_patterns),
                list(one._original_target_patterns),
                operations=[unpack(), *one.operations],
            )
        made.append(one)
    # the last parts of all names: `weight`, `bias`, `class_embedding`, ...
    for name in sorted({key.rpartition(".")[2] for key in model.state_dict()}):
        made.append(WeightConverter(name, name, operations=[unpack()]))
    return made


def _operation() -> Any:
    from transformers.core_model_loading import ConversionOps

    class Unpack(ConversionOps):
        """Packed tensors -> dense ones; others stay."""

        def __init__(self) -> None:
            self.packed_dtype: Any = None

        def convert(
            self, input_dict: dict[str, Any], *_: Any, full_layer_name: str = "", **__: Any
        ) -> dict[str, Any]:
            """Of each pattern, one tensor or several; faults are told with the whole name."""
            made = {}
            for key, value in input_dict.items():
                name = full_layer_name if full_layer_name.endswith(key) else key
                one_or_more = value if isinstance(value, list) else [value]
                dense = [self._unpacked(name, one) for one in one_or_more]
                made[key] = dense if isinstance(value, list) else dense[0]
            return made

        def _unpacked(self, key: str, tensor: Any) -> Any:
            from hamcli.checkpoint.packed.torch_tensors import is_packed_tensor, unpack_tensor

            if not is_packed_tensor(tensor):
                return tensor
            dense = unpack_tensor(tensor, key)
            wished = self.packed_dtype if dense.is_floating_point() else None
            return dense.to(device=tensor.device, dtype=wished or dense.dtype)

        @property
        def reverse_op(self) -> Any:
            """Saving writes dense tensors."""
            from transformers.core_model_loading import _IdentityOp

            return _IdentityOp()

    return Unpack
