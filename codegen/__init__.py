"""From a block and a target to code."""
