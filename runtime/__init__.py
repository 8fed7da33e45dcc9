"""What is alive while a model serves."""
