"""MeMo (arXiv 2605.15156): a memory model that has learned a corpus answers the served model's sub-questions."""
