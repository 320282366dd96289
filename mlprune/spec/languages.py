"""Language codes and their English names (ISO 639, through langcodes)."""

import re

import langcodes

from mlprune.errors import SpecError

NOT_A_LANGUAGE = ("mis", "mul", "und", "zxx")  # uncoded, multiple, undetermined, none; qaa-qtz is private use


def language_name(code: str, key: str = "language") -> str:
    """Return the English name of an ISO 639 code: `fr` -> `French`, `swh` -> `Swahili`.

    Raises SpecError, naming `key`, if no language has the code.
    """
    if re.fullmatch("[a-z]{2,3}", code) and code not in NOT_A_LANGUAGE and not "qaa" <= code <= "qtz":
        language = langcodes.get(code)
        if language.is_valid():
            return str(language.display_name())
    raise SpecError(key, repr(code), "not an ISO 639 code of a language; write en, fr, sw, ...")
