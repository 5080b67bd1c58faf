"""From data files to prompts in a saved order, and from batches to packed micro-batches."""
