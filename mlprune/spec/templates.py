"""Templates as a user writes them: text with slots in braces, filled by `str.format`."""

from collections.abc import Sequence
from string import Formatter

from mlprune.errors import SpecError


def check_template(template: str, key: str, needed: Sequence[str], also: Sequence[str] = ()) -> None:
    """Raises SpecError, naming `key`, unless the slots are `needed`, each once, and at will those of `also`."""
    try:
        slots = [slot for slot in Formatter().parse(template) if slot[1] is not None]
    except ValueError as error:
        remedy = f"{error}; write a brace that is no slot twice, {{{{ or }}}}"
        raise SpecError(key, repr(template), remedy) from error
    known = ", ".join(f"{{{name}}}" for name in (*also, *needed))
    for _, name, form, conversion in slots:
        if name not in (*needed, *also) or form or conversion:
            raise SpecError(key, repr(template), f"has a slot that is none of {known}; leave it out")
    for name in needed:
        if [slot[1] for slot in slots].count(name) != 1:
            raise SpecError(key, repr(template), f"needs {{{name}}} once; its slots are {known}")
