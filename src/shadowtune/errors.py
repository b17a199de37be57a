"""Errors that users can cause. The command line prints one as a single line and exits with code 2."""


class ShadowtuneError(Exception):
    """Base class of all errors raised on purpose: the message names the thing, its value and a hint."""

    in_every_process = False
    """Whether every process of a launch raises the same error, of which the first one's line is enough."""


class ConfigError(ShadowtuneError, ValueError):
    """A setting is unknown, of the wrong type or out of its range."""


class AttachError(ShadowtuneError, RuntimeError):
    """A shadow cannot be attached to, switched on or detached from this base."""


class UnsupportedArchitectureError(AttachError):
    """The base's ``model_type`` is not in the table of supported architectures."""


class CheckpointError(ShadowtuneError, OSError):
    """A saved shadow is missing or damaged, has another format, or belongs to another base."""


class DataError(ShadowtuneError, ValueError):
    """A data set is missing, empty, malformed or has nothing to train on."""


class HiddenToolsError(DataError):
    """A chat template omits tools, or calls of tools, from the prompt."""


class TrainingError(ShadowtuneError, RuntimeError):
    """Training cannot start or continue, for instance because the loss is NaN."""
