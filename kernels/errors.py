"""The error of a kernel that was asked for and cannot run."""


class BackendError(RuntimeError):
    """The back-end that was asked for cannot run here; the message says why."""
