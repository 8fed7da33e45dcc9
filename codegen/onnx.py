"""An ONNX file that any ONNX Runtime runs, and that a library of kernels makes fast.

skimp::dynk_ffn(x, scores, tau, ..)  -->  skimp::DynkFfn_relu(x, scores, tau, ..)

Each node names an operator of the domain ``skimp``, and the file holds a function of standard
operators for it: the dense network, with the neurons of experts that do not run replaced by zeros.
Functions have no conditions on attributes, so the activation and the gate are part of the
operator's name; biases that a block lacks are zeros. Thresholds are inputs with defaults.
"""

import glob
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..ir.artefact import drafts
from ..ir.cost import write_atomically
from ..ir.errors import ExportError, first_line
from ..ir.op import SCORED
from .cpp.ort import DOMAIN, compile_operators, operator_name
from .cpp.spec import detect_isa
from .exported import Program, Report
from .ort import Session, digest, specs_of

VERSION, OPSET = 1, 18
LARGE = 1 << 30
"""Bytes of weights above which they are written beside the file: a protobuf ends at 2 GiB."""

_ACTS: dict[str, Sequence[tuple[str, Sequence[str | float]]]] = {
    "identity": [("Identity", ["u"])],
    "relu": [("Relu", ["u"])],
    "gelu": [
        ("Mul", ["u", 2**-0.5]), ("Erf", [-1]), ("Add", [-1, 1.0]),
        ("Mul", ["u", -1]), ("Mul", [-1, 0.5]),
    ],
    "gelu_tanh": [
        ("Mul", ["u", "u"]), ("Mul", [-1, 0.044715]), ("Add", [-1, 1.0]),
        ("Mul", ["u", -1]), ("Mul", [-1, 0.7978845608028654]), ("Tanh", [-1]),
        ("Add", [-1, 1.0]), ("Mul", ["u", -1]), ("Mul", [-1, 0.5]),
    ],
    "silu": [("Sigmoid", ["u"]), ("Mul", ["u", -1])],
    "gelu_quick": [("Mul", ["u", 1.702]), ("Sigmoid", [-1]), ("Mul", ["u", -1])],
    "relu2": [("Relu", ["u"]), ("Mul", [-1, -1])],
}  # fmt: skip
"""Steps of an activation of ``u``: an operator and its arguments, of which -1 is the last step."""


def function(act: str, gated: bool, opset: int = OPSET) -> Any:
    """The body of an operator in standard operators, as an ``onnx.FunctionProto``."""
    from onnx import AttributeProto, helper

    nodes: list[Any] = []

    def call(op: str, *inputs: str, **attributes: Any) -> str:
        out = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def number(value: float, like: str) -> str:
        # of the dtype of the rows, whatever it is
        return call("CastLike", call("Constant", value_float=value), like)

    def linear(w: str, b: str) -> str:
        return call("Add", call("MatMul", "x", call("Transpose", w, perm=[1, 0])), b)

    def activated(u: str) -> str:
        last = u
        for op, arguments in _ACTS[act]:
            named = [
                u if a == "u" else last if a == -1 else number(float(a), "x") for a in arguments
            ]
            last = call(op, *named)
        return last

    scored = act == SCORED
    up = linear("w_in", "b_in")
    if gated:
        hidden = call("Mul", activated(linear("w_gate", "b_gate")), up)
    else:
        hidden = up if scored else activated(up)
    axis = call("Constant", value_ints=[-1])
    if scored:
        below = call("Less", call("Abs", "scores"), "tau")
    else:
        limit = call("Mul", "tau", call("ReduceMax", "scores", axis, keepdims=1))
        below = call("Less", "scores", limit)
    # not below, rather than above: a NaN score runs every expert
    runs = call("Unsqueeze", call("Not", below), axis)
    size = helper.make_node("Constant", [], [f"v{len(nodes)}"])
    reference = size.attribute.add()
    reference.name, reference.ref_attr_name = "value_int", "expert_size"
    reference.type = AttributeProto.INT
    nodes.append(size)
    one = call("Reshape", size.output[0], call("Constant", value_ints=[1]))
    by_expert = call("Reshape", hidden, call("Concat", call("Shape", "scores"), one, axis=0))
    if scored:
        by_expert = call("Mul", by_expert, call("Unsqueeze", "scores", axis))
    kept = call("Where", runs, by_expert, number(0.0, "x"))
    product = call("MatMul", call("Reshape", kept, call("Shape", hidden)), "w_out")
    nodes.append(helper.make_node("Add", [product, "b_out"], ["y"]))
    return helper.make_function(
        DOMAIN,
        operator_name(act, gated),
        _inputs(gated),
        ["y"],
        nodes,
        [helper.make_opsetid("", opset)],
        ["expert_size"],
    )


def _inputs(gated: bool) -> list[str]:
    gate = ["w_gate", "b_gate"] if gated else []
    return ["x", "scores", "tau", "w_in", "b_in", *gate, "w_out", "b_out"]


def schema(act: str, gated: bool) -> Any:
    """The signature of an operator, which the exporter asks for."""
    from onnx.defs import OpSchema

    kinds = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    return OpSchema(
        operator_name(act, gated),
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter(n, "T") for n in _inputs(gated)],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", kinds, "")],
        attributes=[OpSchema.Attribute("expert_size", OpSchema.AttrType.INT, required=True)],
    )


def _translation(used: set[tuple[str, bool]]) -> Callable[..., Any]:
    """What the exporter calls for each block; notes which operators it met."""
    from onnxscript import opset18 as standard
    from onnxscript.values import Op, Opset

    domain = Opset(DOMAIN, VERSION)

    def dynk_ffn(
        x: Any, scores: Any, tau: Any, w_in: Any, b_in: Any, w_gate: Any, b_gate: Any, w_out: Any,
        b_out: Any, expert_size: int, act: str,
    ) -> Any:  # fmt: skip
        def bias(given: Any, length: int) -> Any:
            if given is not None:
                return given
            return standard.CastLike(standard.Constant(value_floats=[0.0] * length), x)

        gated = w_gate is not None
        used.add((act, gated))
        d_ff, d_out = int(w_in.shape[0]), int(w_out.shape[1])
        gate = [w_gate, bias(b_gate, d_ff)] if gated else []
        return Op(domain, operator_name(act, gated), schema(act, gated))(
            x, scores, tau, w_in, bias(b_in, d_ff), *gate, w_out, bias(b_out, d_out),
            expert_size=expert_size,
        )  # fmt: skip

    return dynk_ffn


def to_model(captured: Program, opset: int = OPSET) -> Any:
    """An ``onnx.ModelProto`` of a captured model.

    Raises:
        ExportError: An operator, or an opset, that the exporter lacks.
    """
    from .onnx_attention import SDPA, attention

    used: set[tuple[str, bool]] = set()
    try:
        made = torch.onnx.export(
            captured.program,
            input_names=list(captured.inputs),
            output_names=list(captured.outputs),
            opset_version=opset,
            dynamo=True,
            optimize=False,  # it would merge thresholds that are equal for now
            verbose=False,
            custom_translation_table={
                torch.ops.skimp.dynk_ffn.default: _translation(used),
                SDPA: attention,
            },
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            f"the model cannot be written as ONNX opset {opset}: {first_line(cause)}"
        ) from error
    assert made is not None
    model = made.model_proto
    written = next(o.version for o in model.opset_import if not o.domain)
    if written != opset:  # the exporter only warns
        raise ExportError(f"the exporter cannot write opset {opset}; it came to {written}")
    return with_functions(model, captured, used, opset)


def with_functions(model: Any, captured: Program, used: set[tuple[str, bool]], opset: int) -> Any:
    """Add the bodies of operators, and make thresholds inputs."""
    from onnx import TensorProto, helper

    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of the exporting machine, half of a small file
    model.functions.extend(function(act, gated, opset) for act, gated in sorted(used))
    if not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    held = {t.name: t for t in model.graph.initializer}
    for name in captured.taus.values():
        if name not in held:
            raise ExportError(f"the exporter lost the threshold {name}")
        model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(held[name].dims))
        )
    helper.set_model_props(
        model,
        {
            "skimp.taus": json.dumps(captured.taus),
            "skimp.gates": json.dumps(captured.gates),
            "skimp.torch": torch.__version__,
            "skimp.sha256": digest(model),
        },
    )
    return model


def write_onnx(
    captured: Program, path: Path, tolerance: float = 1e-4, opset: int = OPSET, native: bool = False
) -> Report:
    """Write a converted model as ONNX.

    Args:
        captured: The model, on the CPU.
        path: Replaced only when the new file is complete, passes the checker and agrees. Weights
            of more than :data:`LARGE` bytes lie beside it, in a file with ``.DIGEST.data`` at its
            end.
        tolerance: Largest relative difference of an output to the model's.
        opset: Of the standard operators, at least :data:`OPSET`.
        native: Write, beside it, the library that runs its blocks on skimp's kernels, in a file
            with ``.so`` at its end, for machines like this one.

    Raises:
        ExportError: It cannot be exported, or the result is not within the bounds.
        CompileError: The library is asked for, and there is no C++ compiler.
    """
    import onnx
    import onnxruntime
    from onnx.external_data_helper import set_external_data

    proto = to_model(captured, opset)
    # named by its contents: until the new file takes its place, the old one needs its own
    data = path.with_name(f"{path.name}.{digest(proto)[:12]}.data")
    with drafts(path) as scratch:
        draft = scratch / path.name
        if proto.ByteSize() > LARGE:  # save_model's own way stumbles over one in the working folder
            for tensor in proto.graph.initializer:
                if len(tensor.raw_data) >= 1024:
                    set_external_data(tensor, data.name)
        onnx.save_model(proto, draft)
        onnx.checker.check_model(str(draft), full_check=True)
        for kernels in (False, True)[: 1 + native]:
            errors = captured.compare(Session(draft, native=kernels).run, tolerance)
        if native:
            library = compile_operators(specs_of(proto)).read_bytes()
            write_atomically(path.with_name(f"{path.name}.so"), library)
        beside = scratch / data.name
        size = sum(f.stat().st_size for f in scratch.iterdir())
        apart = beside.exists()
        if apart:
            os.replace(beside, data)
        os.replace(draft, path)
        for old in path.parent.glob(glob.escape(path.name) + "." + "[0-9a-f]" * 12 + ".data"):
            if not (apart and old == data):
                old.unlink(missing_ok=True)
    if native:
        note = f"{path.name}.so is for register_custom_ops_library, on CPUs with {detect_isa()}"
    else:
        note = (
            "stock ONNX Runtime computes every expert and masks: the time of the dense model, not "
            "of the sparse one; skimp.load(FILE) or --native brings the kernels"
        )
    notes = [note, f"opset {opset}; thresholds are the inputs NAME.tau, with defaults"]
    return Report(
        "onnx", str(path), size, "any ONNX Runtime (tested with "
        f"{onnxruntime.__version__})", captured.coverage, len(captured.taus), errors,
        captured.free, None, notes,
    )  # fmt: skip
