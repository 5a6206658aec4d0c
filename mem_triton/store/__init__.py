"""Keeps memory: banks on disk, pages on the device, and the way between them."""
