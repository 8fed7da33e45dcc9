"""The plugins of vLLM and SGLang: safe without them, and right against what they document.

Neither is installed here. Stand-ins have the part of their interfaces that plugins see, as in their
sources: who calls what, with which names, in which order.
"""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import skimp
import torch

hf = pytest.importorskip("transformers")

CONFIG = """
from abc import ABC, abstractmethod
class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}
    @abstractmethod
    def get_name(self): ...
    @abstractmethod
    def get_supported_act_dtypes(self): ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...
    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...
    @classmethod
    @abstractmethod
    def from_config(cls, config): ...
    @abstractmethod
    def get_quant_method(self, layer, prefix): ...
"""
SCALED = """
    @abstractmethod
    def get_scaled_act_names(self): ...
class LinearMethodBase(ABC):
    @abstractmethod
    def apply(self, layer, x, bias=None): ...
"""
LINEAR = """
import torch
from torch import nn
class LinearBase(nn.Module):
    def __init__(self, input_size, sizes, quant_config, prefix):
        super().__init__()
        self.output_partition_sizes = sizes
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        assert self.quant_method is not None
        size = input_size, sum(sizes)
        self.quant_method.create_weights(self, size[0], sizes, *size, torch.float32,
                                         weight_loader=None)
    def forward(self, x):
        return self.quant_method.apply(self, x, None)
"""
UNQUANTIZED = """
class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, inputs, sizes, input_size, output_size, dtype, **_):
        layer.weight = nn.Parameter(torch.empty(sum(sizes), inputs))
    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)
"""
VLLM = {
    "model_executor/layers/quantization/base_config.py": CONFIG,
    "model_executor/layers/quantization/__init__.py": """
QUANTIZATION_METHODS, CONFIGS = ["fp8"], {}
def register_quantization_config(name):
    def wrap(cls):
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
        if name in QUANTIZATION_METHODS or not issubclass(cls, QuantizationConfig):
            raise ValueError(name)
        CONFIGS[name] = cls
        QUANTIZATION_METHODS.append(name)
        return cls
    return wrap
""",
    "model_executor/layers/linear.py": f"""
from abc import ABC, abstractmethod
class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, *a, **k): ...
    @abstractmethod
    def apply(self, layer, x, bias=None): ...
{LINEAR}{UNQUANTIZED}""",
    "model_executor/models/utils.py": """
from dataclasses import dataclass, field
@dataclass
class WeightsMapper:
    orig_to_new_regex: dict = field(default_factory=dict)
    def apply(self, weights):
        for name, tensor in weights:
            for pattern, new in self.orig_to_new_regex.items():
                if pattern.search(name):
                    if new is None:
                        break
                    name = pattern.sub(new, name)
            else:
                yield name, tensor
""",
}
SGLANG = {
    "srt/layers/quantization/base_config.py": CONFIG + SCALED,
    "srt/layers/quantization/__init__.py": "QUANTIZATION_METHODS = {}\n",
    "srt/layers/quantization/unquant.py": "import torch\nfrom torch import nn\n"
    f"from .base_config import LinearMethodBase\n{UNQUANTIZED}",
    "srt/layers/linear.py": LINEAR,
    "srt/server_args.py": "QUANTIZATION_CHOICES = ['fp8']\n",
    "srt/model_loader/loader.py": """
def safetensors_weights_iterator(tensors):
    yield from tensors.items()
""",
    "srt/plugins/hook_registry.py": """
import enum, functools, importlib
HookType = enum.Enum("HookType", "BEFORE AFTER AROUND REPLACE")
class HookRegistry:
    @classmethod
    def register(cls, target, hook, kind):
        assert kind is HookType.AROUND
        module, _, name = target.rpartition(".")
        module = importlib.import_module(module)
        setattr(module, name, functools.partial(hook, getattr(module, name)))
""",
}
SERVE = """
import json, sys
import torch
from torch import nn
from safetensors.torch import load_file
folder, expected = sys.argv[1:]
from skimp.runtime.hub import serving
# nothing of theirs is imported before they ask
assert "vllm" not in sys.modules and "sglang" not in sys.modules

class MLP(nn.Module):  # as their Llama has it
    def __init__(self, linear, d, d_ff, config, prefix):
        super().__init__()
        self.gate_up_proj = linear(d, [d_ff, d_ff], config, f"{prefix}.gate_up_proj")
        self.down_proj = linear(d_ff, [d], config, f"{prefix}.down_proj")
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(nn.functional.silu(gate) * up)

def serve(server, methods, linear, read):
    register = getattr(serving, server)
    register(), register()  # every process calls it, some twice
    stored = json.load(open(folder + "/config.json"))
    config = methods["skimp"].from_config(stored["quantization_config"])
    assert config.get_name() == "skimp" and torch.bfloat16 in config.get_supported_act_dtypes()
    name = "model.layers.1.mlp"
    mlp = MLP(linear, stored["hidden_size"], stored["intermediate_size"], config, name)
    other = linear(4, [6], config, "model.layers.1.self_attn.o_proj")
    assert type(other.quant_method).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(nn.LayerNorm(4), "model.norm") is None
    weights = list(read(config, load_file(folder + "/model.safetensors")))
    assert all(t.numel() for n, t in weights)  # the guard against other libraries is gone
    names = {f"{name}.{n}": p for n, p in mlp.named_parameters()}
    for n, tensor in weights:
        if n in names:
            names.pop(n).data.copy_(tensor)
    assert not names, names
    case = torch.load(expected, weights_only=True)
    with torch.no_grad():
        assert torch.allclose(mlp(case["x"]), case["y"], atol=1e-5)

from vllm.model_executor.layers import linear, quantization
serve("vllm", quantization.CONFIGS, linear.LinearBase,
      lambda config, tensors: config.get_cache_scale_mapper().apply(tensors.items()))
from sglang.srt import server_args
from sglang.srt.layers import linear, quantization
from sglang.srt.model_loader import loader
serve("sglang", quantization.QUANTIZATION_METHODS, linear.LinearBase,
      lambda config, tensors: loader.safetensors_weights_iterator(tensors))
assert server_args.QUANTIZATION_CHOICES.count("skimp") == 1
"""


def llama(folder, **options):
    from skimp.passes.convert import prepare

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.3,
    )  # fmt: skip
    model, ids = hf.LlamaForCausalLM(config).eval(), torch.randint(2, 60, (2, 5))
    gm, _ = prepare(model, {"input_ids": ids}, expert_size=4, router_width=4)
    skimp.set_tau(gm, 0.5)
    return skimp.save_pretrained(gm, model, folder, {"input_ids": ids})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A converted decoder, and what the second network makes of some rows."""
    root = tmp_path_factory.mktemp("serving")
    tree = llama(root / "model")
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.save({"x": x, "y": tree.model.layers[1].mlp(x)}, root / "case.pt")
    return root


def test_servers_make_and_fill_the_blocks(served, tmp_path):
    for server, files in (("vllm", VLLM), ("sglang", SGLANG)):
        for name, text in files.items():
            path = tmp_path / server / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    path = os.pathsep.join([str(Path(skimp.__file__).parents[1]), str(tmp_path)])
    command = [sys.executable, "-c", SERVE, str(served / "model"), str(served / "case.pt")]
    got = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert got.returncode == 0, got.stderr


def test_entry_points_load_without_the_servers():
    from skimp.runtime.hub import serving

    for group, function in (
        ("vllm.general_plugins", serving.vllm),
        ("sglang.srt.plugins", serving.sglang),
    ):
        text = (Path(skimp.__file__).parent / "pyproject.toml").read_text()
        assert f'[project.entry-points."{group}"]\nskimp = "{serving.__name__}:' in text
        for point in entry_points(group=group):  # where skimp is installed
            assert point.name != "skimp" or point.load() is function
    for server in (serving.vllm, serving.sglang):
        with pytest.raises(ImportError):
            server()


def test_a_model_that_they_cannot_serve():
    from types import SimpleNamespace

    from skimp.runtime.hub.serving import make_config

    config = make_config(object, SimpleNamespace(LinearMethodBase=object), object)
    with pytest.raises(skimp.SkimpError, match="attention projections"):
        config({"a": {"linear": True}})
