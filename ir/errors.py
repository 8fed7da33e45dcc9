"""Every error a user can meet. Each says what happened, where, and what to do about it."""


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


class TraceError(SkimpError):
    """A model that cannot be captured as one graph."""


class TargetError(SkimpError):
    """A model that cannot verify token trees, or a drafter or an option that does not fit it."""


class ExportError(SkimpError):
    """A model that cannot leave through a door, or an artefact that is not worth having."""


class PlanError(SkimpError):
    """A removal from a U-Net that is not legal, or that no configuration can say."""


MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What comes of reading a file as something that it is not; readers make an error of ours of it."""
