"""Export a converted model to ONNX, and run it where neither skimp nor PyTorch is imported.

python examples/leave_python.py --quick
python examples/leave_python.py out/model      # what `make demo` leaves
"""

import subprocess
import sys
from pathlib import Path

import skimp
import small
from skimp.passes.convert import prepare
from skimp.runtime.models import load_pretrained

ELSEWHERE = """
import sys, numpy, onnxruntime
path, *libraries = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
for library in libraries:  # skimp's kernels; without them, the functions in the file
    options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
ids = numpy.array([[2, 3, 5, 7], [11, 13, 17, 19]])
feed = dict(input_ids=ids, attention_mask=numpy.ones_like(ids))
feed = {i.name: feed.get(i.name, numpy.zeros_like(ids)) for i in session.get_inputs()}
knobs = [i.name for i in session.get_overridable_initializers()]  # one tau per block
for tau in (0.0, 0.5):
    taus = {name: numpy.array(tau, numpy.float32) for name in knobs}
    first = session.run(None, feed | taus)[0]
    print("tau", tau, "output", first.shape, "begins with", first.flat[0])
assert not {"torch", "skimp"} & set(sys.modules)
"""


def main(quick=False, folder="out/model", out="out/leave"):
    if quick:
        example = small.text()[0]
        model, _ = prepare(small.encoder(), example)  # in experts, not trained
    else:
        loaded = load_pretrained()
        model = skimp.load(Path(folder), loaded.model)
        example = dict(loaded.tokenizer(["a text", "another one"], return_tensors="pt"))
    path = Path(out) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = skimp.export(model, example, path, native=True)  # compared with the model first
    print(f"{report.blocks} blocks, {report.bytes / 1e6:.1f} MB, errors {report.errors}")
    for libraries in ([], [f"{path.resolve()}.so"]):
        done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(path), *libraries],
                              capture_output=True, text=True, check=False)  # fmt: skip
        print(done.stdout or done.stderr, end="")
        done.check_returncode()
    return report


if __name__ == "__main__":
    main("--quick" in sys.argv)
