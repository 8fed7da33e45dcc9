"""From a spec to C++: constants first, then the text that is the same for every block."""

from pathlib import Path

from .spec import KernelSpec

_TEMPLATE = Path(__file__).with_name("dynk_ffn.h")
_ACTS = ("identity", "relu", "gelu", "gelu_tanh", "silu")


def emit(spec: KernelSpec) -> str:
    """The complete source of one kernel, which needs no header but the compiler's own."""
    lanes = {"avx512": 16, "avx2": 8, "portable": 4}[spec.isa]
    constants = {
        "D": spec.d,
        "D_FF": spec.d_ff,
        "D_OUT": spec.d_out,
        "E": spec.expert_size,
        "LANES": lanes,
        "ACT": _ACTS.index(spec.act),
    }
    flags = {
        "GATED": spec.gated,
        "B_IN": spec.b_in,
        "B_GATE": spec.b_gate,
        "B_OUT": spec.b_out,
    }
    lines = [f"// {spec.name}, for {spec.isa}"]
    lines += [f"constexpr long {k} = {v};" for k, v in constants.items()]
    lines += [f"constexpr bool {k} = {str(v).lower()};" for k, v in flags.items()]
    lines += [f"#define STORAGE_{'BF16' if spec.dtype == 'bfloat16' else 'F32'}", ""]
    return "\n".join(lines) + _TEMPLATE.read_text()
