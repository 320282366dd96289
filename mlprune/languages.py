"""Language codes and their English names (ISO 639, through langcodes)."""

import langcodes

from mlprune.errors import SpecError


def name_of(code: str, key: str = "language") -> str:
    """The English name of an ISO 639 code: `fr` -> `French`, `swh` -> `Swahili`.

    Raises SpecError, naming `key`, when no language has the code.
    """
    if code.isalpha() and code.islower() and len(code) in (2, 3):
        language = langcodes.get(code)
        if language.is_valid():
            return str(language.display_name())
    raise SpecError(key, repr(code), "not an ISO 639 code of a language; write en, fr, sw, ...")
