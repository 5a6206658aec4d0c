"""Engine-neutral serving logic: requests in, device tables out."""
