"""Templates as a user writes them: text with slots in braces, filled by `str.format`."""

from collections.abc import Sequence
from string import Formatter

from mlprune.errors import SpecError


def check_template(template: str, key: str, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise SpecError, naming `key`, unless the template has each of the `needed` slots exactly once.

    It may also have the `optional` slots, any number of times, and no others.
    """
    try:
        slots = [slot for slot in Formatter().parse(template) if slot[1] is not None]
    except ValueError as error:
        remedy = f"{error}; write a brace that is not a slot twice, {{{{ or }}}}"
        raise SpecError(key, repr(template), remedy) from error
    known = ", ".join(f"{{{name}}}" for name in (*optional, *needed))
    for _, name, form, conversion in slots:
        if name not in (*needed, *optional) or form or conversion:
            raise SpecError(key, repr(template), f"has a slot that is none of {known}; remove it")
    for name in needed:
        if [slot[1] for slot in slots].count(name) != 1:
            raise SpecError(key, repr(template), f"needs {{{name}}} once; its slots are {known}")
