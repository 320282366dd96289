"""The exceptions that mlprune raises on purpose.

    MlpruneError
    ├── UserError            wrong input; shown in one line, exit code 2
    │   ├── SpecError        a key of the sweep spec, or a command's option
    │   ├── CorpusError      parallel text
    │   ├── ModelError       a model or its checkpoint
    │   └── StorageError     a folder or an object store
    ├── SweepError           trials failed; the message says which and why
    ├── WorkerLostError      a worker died during a call; the call can be retried on a new worker
    └── RayLostError         the processes of Ray itself died, more often than they are started again

Terminated, a BaseException like KeyboardInterrupt, is raised by SIGTERM.

A `UserError` names the key, the value and the remedy. All of them survive pickling between processes.
"""


class MlpruneError(Exception):
    """The root of all exceptions that mlprune raises on purpose."""


VALUE_LENGTH, REMEDY_LENGTH = 200, 1000  # characters of a value and a remedy that are shown


class UserError(MlpruneError):
    """Wrong input, as one line: `key: value: remedy`. A `value` of None was not given, and is left out.

    Values come from files of other people: long ones are cut in the middle, and control characters are escaped.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(key, value, remedy)
        self.key, self.value, self.remedy = key, value, remedy

    def __str__(self) -> str:
        value = "" if self.value is None else f" {_shown(str(self.value), VALUE_LENGTH)}:"
        return f"{_shown(self.key, VALUE_LENGTH)}:{value} {_shown(self.remedy, REMEDY_LENGTH)}"


def _shown(text: str, length: int) -> str:
    """Return the text in printable characters, at most about `length` of them."""
    if len(text) > length:
        text = f"{text[: length // 2]}...{text[-length // 2 :]}"
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class SpecError(UserError):
    """A key of the spec, or an option, has an invalid value."""


class CorpusError(UserError):
    """The parallel text lacks a language, has columns of unequal length or too few lines."""


class ModelError(UserError):
    """The model cannot be found, read or held in memory."""


class StorageError(UserError):
    """A place to write to is in use, full or not writable."""


class SweepError(MlpruneError):
    """Trials of a sweep failed."""


class WorkerLostError(MlpruneError):
    """A shard's worker or its node died. `not_started`: the work had not begun when that was noticed."""

    def __init__(self, cause: str, not_started: bool = False) -> None:
        super().__init__(cause, not_started)
        self.cause, self.not_started = cause, not_started

    def __str__(self) -> str:
        return self.cause


class RayLostError(MlpruneError):
    """Ray itself died, and is not started again."""


class Terminated(BaseException):
    """SIGTERM was received. As with KeyboardInterrupt, no handler of errors may stop it."""
