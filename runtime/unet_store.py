"""A pruned U-Net's folder: diffusers' own files, and beside them what distillation needs to know.

``skimp-unet.json`` holds what went, the report, and the taps of every way to compare a student
with its teacher, so that no capture is needed again. Nothing of it is needed to load the student.
"""

import json
from pathlib import Path
from typing import Any

from ..ir.artefact import written_whole
from ..ir.errors import MALFORMED, ArtefactError
from ..passes.prune_unet import Pruned
from ..passes.unet_distill import ALIGNED, DistillUNet

RECORD = "skimp-unet.json"


def save_student(made: Pruned, out: Path, teacher: str) -> None:
    """Write a student and its record.

    Raises:
        ArtefactError: The folder cannot be written.
    """
    ways = [DistillUNet(aligned=a) for a in ALIGNED] + [DistillUNet(taps="last")]
    record = {
        "format": "skimp-unet",
        "version": 1,
        "teacher": teacher,
        "report": made.report,
        "pairs": {_way(w): w.pairs(made.unet, made.plan, made.names) for w in ways},
    }
    student: Any = made.student
    with written_whole(out) as part:
        student.save_pretrained(part)
        (part / RECORD).write_text(json.dumps(record, indent=1))


def read_pairs(folder: Path, how: DistillUNet) -> dict[str, str]:
    """The taps of a student that :func:`save_student` wrote.

    Raises:
        ArtefactError: There is no record, or one of another version.
    """
    if how.taps == "none":
        return {}
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
        pairs = {str(s): str(t) for s, t in record["pairs"][_way(how)].items()}
        known = record["format"] == "skimp-unet" and record["version"] == 1
    except (OSError, *MALFORMED) as error:
        raise ArtefactError(
            f"{folder} holds no {RECORD} that can be read, so its taps are not known; make the "
            "student with `skimp prune-unet`, or give --taps none"
        ) from error
    if not known:
        raise ArtefactError(f"{path} is of another version; prune the teacher again")
    return pairs


def _way(how: DistillUNet) -> str:
    return how.aligned if how.taps == "attention" else how.taps
