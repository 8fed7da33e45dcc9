"""vLLM and SGLang: a converted folder as one of their quantization methods. Experimental.

Both make a model of linear layers and ask, for each, for a method that makes its weights and
computes it. The first linear of a network gets one that holds the block and keeps its result, the
last one that gives it out, and what the model does in between is done to zeros, as in
:mod:`skimp.passes.graft`. Written against the interfaces of vLLM 0.16 and SGLang 0.5; not run on a
card yet. Networks only: attention projections are fused there. No tensor parallelism.

They find :func:`vllm` and :func:`sglang` by the entry points in ``pyproject.toml`` and call them in
every process. Nothing of theirs is imported before.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...ir.errors import SkimpError

METHOD = "skimp"


def vllm() -> None:
    """The entry point ``vllm.general_plugins``."""
    from vllm.model_executor.layers import linear, quantization
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.models.utils import WeightsMapper

    if METHOD in quantization.QUANTIZATION_METHODS:
        return  # it is called again in processes that are forked

    class Config(make_config(QuantizationConfig, linear, linear.UnquantizedLinearMethod)):  # type: ignore[misc]
        def get_cache_scale_mapper(self) -> Any:
            """What renames weights as they are read, whatever its name says."""
            return WeightsMapper(orig_to_new_regex=renames(self))

    quantization.register_quantization_config(METHOD)(Config)


def sglang() -> None:
    """The entry point ``sglang.srt.plugins``."""
    from sglang.srt import server_args
    from sglang.srt.layers import linear, quantization
    from sglang.srt.layers.quantization import unquant
    from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    made: list[Any] = []
    bases = SimpleNamespace(LinearBase=linear.LinearBase, LinearMethodBase=LinearMethodBase)

    class Config(make_config(QuantizationConfig, bases, unquant.UnquantizedLinearMethod)):  # type: ignore[misc]
        def __init__(self, blocks: Mapping[str, Any]) -> None:
            super().__init__(blocks)
            made.append(self)

    def renamed(read: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        rules = renames(made[-1]) if made else {}
        return rename(read(*args, **kwargs), rules)

    quantization.QUANTIZATION_METHODS[METHOD] = Config
    if METHOD not in server_args.QUANTIZATION_CHOICES:
        server_args.QUANTIZATION_CHOICES.append(METHOD)
    target = "sglang.srt.model_loader.loader.safetensors_weights_iterator"
    HookRegistry.register(target, renamed, HookType.AROUND)


def make_config(base: type, linear: Any, unquantized: type) -> type:
    """The class of our configs, on the base classes of a server.

    Args:
        base: Its ``QuantizationConfig``.
        linear: Its module with ``LinearBase`` and ``LinearMethodBase``.
        unquantized: Its method for a linear layer that is left alone.
    """

    class Lead(linear.LinearMethodBase):  # type: ignore[misc]
        """For the first linear layer of a network."""

        def __init__(self, spec: Mapping[str, Any]) -> None:
            self.spec = spec
            self.result: Tensor | None = None

        def create_weights(
            self, layer: nn.Module, input_size_per_partition: int,
            output_partition_sizes: list[int], input_size: int, output_size: int,
            params_dtype: torch.dtype, **_: Any,
        ) -> None:  # fmt: skip
            """Make the block, to be filled by the loader of weights."""
            whole = input_size_per_partition, sum(output_partition_sizes)
            if whole != (input_size, output_size):
                raise SkimpError("a converted model cannot be split: serve it with tp size 1")
            from .quantizer import empty_block

            block = empty_block(self.spec, params_dtype)
            block.to_empty(device=torch.empty(0).device)
            tau = block.tau.data
            del block.tau  # loaders look at parameters only
            block.register_parameter("tau", nn.Parameter(tau))
            layer.add_module("dynk", block.requires_grad_(False))
            layer.register_parameter("weight", None)

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """Compute the block; hand on zeros."""
            self.result = layer.dynk(x)
            return x.new_zeros((*x.shape[:-1], sum(layer.output_partition_sizes)))

    class Follow(linear.LinearMethodBase):  # type: ignore[misc]
        """For a later one."""

        def __init__(self, lead: Lead) -> None:
            self.lead = lead
            self.last = False

        def create_weights(
            self, layer: nn.Module, input_size_per_partition: int,
            output_partition_sizes: list[int], input_size: int, output_size: int,
            params_dtype: torch.dtype, **_: Any,
        ) -> None:  # fmt: skip
            """None are needed."""
            site = self.lead.spec["site"]
            self.last = input_size == self.lead.spec["d_ff"] and output_size == site["d_out"]
            layer.register_parameter("weight", None)

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """Give out what the first computed."""
            if not self.last:
                return x.new_zeros((*x.shape[:-1], sum(layer.output_partition_sizes)))
            result, self.lead.result = self.lead.result, None
            assert result is not None
            return result

    class SkimpConfig(base):  # type: ignore[misc]
        """See :class:`skimp.runtime.hub.quantizer.SkimpConfig`."""

        def __init__(self, blocks: Mapping[str, Any]) -> None:
            super().__init__()
            if any(b["linear"] for b in blocks.values()):
                raise SkimpError(
                    "this server fuses attention projections, so converted ones cannot be served; "
                    "convert the networks only"
                )
            self.blocks = blocks
            self.leads: dict[str, Lead] = {}
            self.names: dict[str, str] = {}

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 70

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []  # config.json holds it

        def get_scaled_act_names(self) -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            from .quantizer import SkimpConfig as Checked

            return cls(Checked(**config).blocks)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            """A method for a linear layer by its name in the model."""
            if not isinstance(layer, linear.LinearBase):
                return None
            for name, spec in self.blocks.items():
                if not _part_of(prefix, spec["place"]):
                    continue
                if name in self.leads:
                    return Follow(self.leads[name])
                self.leads[name], self.names[name] = Lead(spec), prefix
                return self.leads[name]
            return unquantized()

    return SkimpConfig


def _part_of(prefix: str, place: Mapping[str, Any]) -> bool:
    """Whether a linear layer is one of those of a place, whatever is before their names."""
    own = prefix.rpartition(".")[0] if place["whole"] else prefix
    return any(own == path or own.endswith(f".{path}") for path in place["paths"])


def renames(config: Any) -> dict[re.Pattern[str], str | None]:
    """From the weights of a folder to those of a model that was made; None for what none reads."""
    rules: dict[re.Pattern[str], str | None] = {}
    for name, spec in config.blocks.items():
        first, site = re.escape(spec["place"]["paths"][0]), spec["site"]
        inside = "" if spec["place"]["whole"] else r"block\."
        # the dense weight of no values, which keeps a library without skimp from running
        rules[re.compile(rf"(^|\.){re.escape(site['w_out'])}$")] = None
        own = r"(tau|[wb]_(?:in|gate|out)|router\.\w+\.weight)$"
        if name in config.names:
            rules[re.compile(rf"^(?:.*\.)?{first}\.{inside}{own}")] = (
                rf"{config.names[name]}.dynk.\1"
            )
    return rules


def rename(
    weights: Iterable[tuple[str, Tensor]], rules: Mapping[re.Pattern[str], str | None]
) -> Iterator[tuple[str, Tensor]]:
    """Weights under their new names."""
    for name, tensor in weights:
        for pattern, to in rules.items():
            if pattern.search(name):
                if to is not None:
                    yield pattern.sub(to, name), tensor
                break
        else:
            yield name, tensor
