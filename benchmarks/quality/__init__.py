"""Answers of a real model about documents of one's own, with the documents as text and as a bank."""
