"""Recall of trained cartridges, beside the text in the context and the rows with which training begins."""
