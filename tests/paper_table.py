"""Sizes and costs of the models that the paper reports (Tables 1 and 2)."""

# Preset, parameters in millions, and multiply-adds in thousands of millions, which the paper calls FLOPs.
PAPER = [
    ("vivit-b-16x2", 88.9, 455.2),
    ("vivit-b-16x2-fe", 115.1, 284.4),
    ("vivit-b-16x2-fsa", 117.3, 372.3),
    ("vivit-b-16x2-fdpa", 88.9, 277.1),
    ("vivit-b-16x2-fe-average-pool", 86.7, 283.9),
]
