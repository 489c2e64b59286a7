"""Clips, augmentation, mixing, optimiser groups, checkpoints, the trainer and its recipes."""
