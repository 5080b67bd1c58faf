"""Errors a user can act on. Anything else is a bug and keeps its traceback."""


class RedoneError(Exception):
    """Base of every error that the command line shows as one message (no traceback, exit code 2)."""


class ConfigError(RedoneError):
    """A configuration that cannot run; the message names key, value and remedy."""


class DataError(RedoneError):
    """A data file or row that cannot be used; the message names file and line."""


class ModelError(RedoneError):
    """A model folder that cannot be loaded or exported."""


class EngineError(RedoneError):
    """A rollout engine failed to start, died, or refused a weight update."""


class EngineDied(EngineError):
    """An engine's process is gone: only a new one can answer."""


class TrainerError(RedoneError):
    """A trainer rank died, diverged, or refused its input."""


class SyncError(RedoneError):
    """A weight update failed: digest, plan or canary. The engines it touched must not generate again."""


class Stopped(Exception):
    """Not an error: the run was asked to stop, saved its state and can be resumed (exit code 75)."""


class RunFolderError(RedoneError):
    """A run folder that exists, has another schema version, or cannot be written."""


class JudgeError(RedoneError):
    """The endpoint of an LLM judge is down or refuses every request; the message names it."""


def first_line(error: BaseException) -> str:
    """Of another library's error, for a message of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]
