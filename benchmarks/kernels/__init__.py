"""Times every operation beside its floor and its baselines; see ``registry`` for how to add one."""
