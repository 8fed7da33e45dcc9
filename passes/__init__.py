"""Graph to graph: find, split, route."""
