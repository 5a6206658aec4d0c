"""Trains cartridges: few keys and values, with which a model answers as if it had a document in its context."""
