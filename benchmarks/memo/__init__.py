"""MeMo on an invented world: its documents, scripted models that know its rules, and what they are measured by."""
