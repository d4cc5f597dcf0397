"""Everything kvcomp raises on purpose. Each message says what is wrong and what to do about it."""


class KVCompError(Exception):
    """Base of all kvcomp errors."""


class InvalidInput(KVCompError, ValueError):
    """An argument has the wrong shape, type, device or range."""


class CorruptData(KVCompError):
    """Bytes that are not what the format allows."""


class UnsupportedVersion(KVCompError):
    """Bytes or a spec written by a newer kvcomp, or with a feature this one does not know."""


class LimitExceeded(KVCompError):
    """A size that a limit forbids, or that a device has no memory for."""


class UnsupportedModel(KVCompError):
    """A model, or a use of one, whose cache kvcomp cannot hold correctly."""


class BackendUnavailable(KVCompError):
    """No kernel can do what was asked on this machine."""


class StoreUnavailable(KVCompError):
    """A store of values (Redis, a folder) that does not answer in time, or refuses."""
