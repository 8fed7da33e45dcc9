"""skimp: a PyTorch compiler that makes each token pay only for the experts it needs."""

__version__ = "0.1.0"
