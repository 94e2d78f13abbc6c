"""Every error the library raises on purpose: one tree, each with a stable code and an exit code for the CLI.

A message states the rule, what was got, and ends with the remedy.
"""


class MtpError(Exception):
    """Base of all errors; `code` is stable and `exit_code` is what the CLI returns."""

    code = "error"
    exit_code = 3


class CheckpointError(MtpError):
    """A model's files are missing, damaged or of a kind that is not supported."""

    code = "checkpoint"


class PairError(MtpError):
    """A target and a drafter do not belong together."""

    code = "pair"


class PromptError(MtpError):
    """A prompt, chat message or template cannot be used."""

    code = "prompt"
    exit_code = 2


class ContextError(PromptError):
    """A prompt has more tokens than the context holds."""

    code = "context"


class ParameterError(MtpError):
    """An argument is outside what is allowed."""

    code = "parameter"
    exit_code = 2


class MemoryRefusal(MtpError):
    """The model or context would not fit into memory."""

    code = "memory"
    exit_code = 4


class HubError(MtpError):
    """A model cannot be found, reached or downloaded from the hub."""

    code = "hub"
    exit_code = 5


class StorageError(MtpError):
    """A disk is full, or a folder cannot be written."""

    code = "storage"


class MachineError(MtpError):
    """This machine cannot run models: no Metal on a Mac, an emulated Python, untested versions."""

    code = "machine"


class KernelError(MtpError):
    """A Metal kernel was called for a shape, format or type that it does not compute."""

    code = "kernel"


class GenerationError(MtpError):
    """Generation cannot continue, for example because logits became NaN."""

    code = "generation"


class EngineError(MtpError):
    """An engine was closed, its thread ended, or it does not run in this process."""

    code = "engine"


class BusyError(MtpError):
    """More requests wait than an engine takes."""

    code = "busy"
