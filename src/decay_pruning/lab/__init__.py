"""Data sets, models, a trainer and comparisons of arms: what it takes to measure pruning, not to use it.

Nothing outside `decay_pruning.lab` and the command line imports this package. It needs the extra
`decay-pruning[lab]`.
"""
