"""What the user can get wrong, as exceptions.

    MlpruneError
    ├── UserError            the user can mend it; one line, exit code 2
    │   ├── SpecError        a key of the sweep spec, or a command's option
    │   ├── CorpusError      parallel text
    │   ├── ModelError       a model or its checkpoint
    │   └── StorageError     a folder to write to
    ├── SweepError           trials failed; the message says which and why
    └── WorkerLostError      a worker died under a call; a new one can take its place

Every `UserError` names the key, the value and the remedy, and survives pickling between processes.
"""


class MlpruneError(Exception):
    """The root of every exception that mlprune raises on purpose."""


class UserError(MlpruneError):
    """A mistake in the input: `key: value: remedy`, in one line."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(key, value, remedy)
        self.key, self.value, self.remedy = key, value, remedy

    def __str__(self) -> str:
        return f"{self.key}: {self.value}: {self.remedy}"


class SpecError(UserError):
    """A key of the spec, or an option, has a value that cannot be."""


class CorpusError(UserError):
    """The parallel text lacks a language, has unequal columns or too few lines."""


class ModelError(UserError):
    """The model cannot be found, read or held."""


class StorageError(UserError):
    """A place to write to is taken, full or not writable."""


class SweepError(MlpruneError):
    """Trials of a sweep failed."""


class WorkerLostError(MlpruneError):
    """A shard's worker, or its node, died: what was asked of it must be asked again of a new one."""

    def __init__(self, cause: str, drained: bool = False) -> None:
        super().__init__(cause, drained)
        self.cause, self.drained = cause, drained  # drained: nothing had begun yet

    def __str__(self) -> str:
        return self.cause
