"""Other people's trainers and formats: thin, each imported only when it is used, none knows another.

Nothing here is imported by `import decay_pruning`; each file says what has to be installed for it.
"""
