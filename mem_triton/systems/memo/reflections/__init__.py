"""Questions and answers about documents, from which a memory model learns them (arXiv 2605.15156, section 3.1).

``steps`` says what is asked of a generator, ``ledger`` keeps every unit of work and its result in SQLite, ``pipeline``
makes the calls within budgets, and ``formats`` writes what came of it.
"""
