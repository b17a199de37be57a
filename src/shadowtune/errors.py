"""Every error that a user can cause. The command line prints one as a single line and exits with code 2."""


class ShadowtuneError(Exception):
    """Base of all errors raised on purpose: the message names the thing, its value and the way out."""


class ConfigError(ShadowtuneError, ValueError):
    """A setting is unknown, of the wrong type or out of its range."""


class AttachError(ShadowtuneError, RuntimeError):
    """A shadow cannot be attached to, switched on or detached from this base."""


class UnsupportedArchitectureError(AttachError):
    """The base's ``model_type`` has no row in the table of architectures."""


class CheckpointError(ShadowtuneError, OSError):
    """A saved shadow is missing, damaged, foreign, or belongs to another base."""


class DataError(ShadowtuneError, ValueError):
    """A data set is missing, empty, malformed or has nothing to learn from."""


class HiddenToolsError(DataError):
    """A chat template leaves tools, or calls of tools, out of the prompt."""


class TrainingError(ShadowtuneError, RuntimeError):
    """Training cannot start or cannot go on, for instance because the loss is not a number."""
