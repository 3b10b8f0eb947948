"""The errors a user of dittune may want to catch. All derive from `DittuneError`."""


class DittuneError(Exception):
    """Something dittune was asked for cannot be done; the message says what to do instead."""


class UnsupportedModelError(DittuneError):
    """No denoiser dittune knows, or an attention processor whose core it cannot reach."""


class AlreadyAttachedError(DittuneError):
    """The pipeline or model already has an owner."""


class SeamError(DittuneError):
    """An installed site was replaced, or never fired: the methods would silently do nothing."""


class SelectionError(DittuneError, ValueError):
    """A layer, head or site that the model does not have, or methods that cannot act together."""


class ConfigError(DittuneError, ValueError):
    """A setting that does not exist or has a value it cannot have."""


class CheckpointError(DittuneError):
    """A model that cannot be found or read, or is stored in a format that is not loaded."""
