"""Keeps the front end's half of memory, engine-neutral: sessions, references, and how an answer is cut."""
