"""Serves requests with memory, engine-neutral: from a request's fields to tables on the device."""
