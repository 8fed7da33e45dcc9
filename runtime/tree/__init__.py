"""Speculative decoding from token trees sized by measured costs."""
