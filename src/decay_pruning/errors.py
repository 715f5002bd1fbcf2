"""The errors that this library raises on purpose. Each message says what was wrong, where, and what to do."""


class DecayPruningError(Exception):
    """Base of every error below, so that one `except` clause catches them all."""


class ConfigError(DecayPruningError, ValueError):
    """A setting has a wrong name, type or value."""


class GraphError(DecayPruningError):
    """The model could not be traced, or nothing in it can be pruned."""


class BudgetError(DecayPruningError):
    """The target cannot be met; the message says how far the pruner got and why."""


class SurgeryError(DecayPruningError):
    """A removal was refused or undone; the model is as it was before the call."""


class ManifestError(DecayPruningError):
    """A saved file is truncated, foreign, or does not fit the model; the model is as it was."""


class DataError(DecayPruningError):
    """A data set is missing, incomplete, or not in a format that is understood."""


class WriteError(DecayPruningError, OSError):
    """A file or folder cannot be written, or another process works on it; what was there is as it was."""


class ExportError(DecayPruningError):
    """A model cannot be exported, or its export computes something else."""
