"""Explicit memory: texts written once as keys and values, attended to by requests that name or retrieve them."""
