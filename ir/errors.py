"""Every error a user can meet. Each says what happened, where, and what to do about it."""

import errno
import os


class SkimpError(Exception):
    """Base of all errors raised on purpose."""


class NothingToConvertError(SkimpError):
    """The graph holds no site that the passes can rewrite."""


class BadWeightsError(SkimpError):
    """A weight holds NaN or infinity, or has a shape the block cannot take."""


class CalibrationError(SkimpError):
    """The calibration set is empty, too small, or does not fit the model."""


class VerificationError(SkimpError):
    """A graph is malformed before or after a pass."""


class CompileError(SkimpError):
    """A generated kernel did not compile or load."""


class ArtefactError(SkimpError):
    """A file on disk is missing, truncated, foreign, or of an unknown version."""


class UnwritableError(ArtefactError, OSError):
    """A file that cannot be written: a full disk, a limit, a folder of somebody else's."""

    def __str__(self) -> str:
        return (
            f"{self.filename} cannot be written ({self.strerror}); free some space or choose "
            "another place. What was there before is unharmed."
        )


class TraceError(SkimpError):
    """A model that cannot be captured as one graph."""


class TargetError(SkimpError):
    """A model that cannot verify token trees, or a drafter or an option that does not fit it."""


class ExportError(SkimpError):
    """A model that cannot leave through a door, or an artefact that is not worth having."""


class PlanError(SkimpError):
    """A removal from a U-Net that is not legal, or that no configuration can say."""


class ClusterError(SkimpError):
    """Other processes, of Ray or of torchrun, that are not there or do not do what they should."""


def first_line(error: BaseException) -> str:
    """Of an error's text, which may be empty."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def unwritable(path: object, error: Exception) -> UnwritableError:
    """An error of ours from one of the system's."""
    if isinstance(error, UnwritableError):
        return error
    reason = getattr(error, "strerror", None) or no_room(error) or first_line(error)
    return UnwritableError(getattr(error, "errno", None) or 0, reason, str(path))


_FULL = tuple(os.strerror(e) for e in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))


def no_room(error: BaseException) -> str:
    """The line of an error that tells of a full disk or of a limit on files; "" if none does.

    Libraries, and compilers that they call, say it in the text of errors of their own.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if any(sign in line for sign in _FULL)), "")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was all that lacked; torch says so in the text of a RuntimeError.

    A thread that has no room for its stack is told of without a reason, and so is a library that
    has none to be loaded into (where a folder forbids that, a reason follows).
    """
    told = str(error).lower()
    signs = ("allocate memory", "out of memory", "can't start new thread")
    return (
        isinstance(error, MemoryError)
        or any(s in told for s in signs)
        or told.endswith("failed to map segment from shared object")
    )


MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What comes of reading a file as something that it is not; readers make an error of ours of it."""
