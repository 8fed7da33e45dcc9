"""From a spec to C++: constants first, then the text that is the same for every kernel."""

from pathlib import Path

from .spec import LANES, KernelSpec, LinearSpec

_HERE = Path(__file__).parent
ACTS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "gelu_quick", "relu2", "scored")
"""In the order of their numbers in C++."""


def emit(spec: KernelSpec | LinearSpec) -> str:
    """The complete source of one kernel, which needs no header but the compiler's own."""
    body = "dynk_ffn.h" if isinstance(spec, KernelSpec) else "linear.h"
    return head(spec) + "".join("\n" + (_HERE / name).read_text() for name in ("vectors.h", body))


def head(spec: KernelSpec | LinearSpec) -> str:
    """The part of the source that depends on the spec."""
    constants: dict[str, int | bool] = {"D": spec.d, "D_OUT": spec.d_out, "LANES": LANES[spec.isa]}
    if isinstance(spec, KernelSpec):
        constants |= {
            "D_FF": spec.d_ff,
            "E": spec.expert_size,
            "ACT": ACTS.index(spec.act),
            "GATED": spec.gated,
            "B_IN": spec.b_in,
            "B_GATE": spec.b_gate,
            "B_OUT": spec.b_out,
        }
    else:
        constants["B_IN"] = spec.bias
    lines = [f"// {spec.name}, for {spec.isa}"]
    for name, value in constants.items():
        kind, text = ("bool", str(value).lower()) if isinstance(value, bool) else ("long", value)
        lines.append(f"constexpr {kind} {name} = {text};")
    lines.append(f"#define STORAGE_{'BF16' if spec.dtype == 'bfloat16' else 'F32'}")
    return "\n".join(lines) + "\n"
