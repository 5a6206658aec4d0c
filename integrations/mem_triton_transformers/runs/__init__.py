"""What every training run has: a log, a folder that can be written, a frozen model, and an identity."""
