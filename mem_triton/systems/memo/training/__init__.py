"""Training of memory models, as far as it needs no model: rows of questions and answers, and recipes."""
