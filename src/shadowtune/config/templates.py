"""Templates of prompts: text with ``{field}`` where a row's field goes, and doubled braces for literal ones.

Only plain names stand in the braces, none of str.format's attributes, indexes, conversions and format specifications:
a template is data, not a program.
"""

import string

from shadowtune.errors import ConfigError


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pieces: literal text, and the name of the field that follows it, or None.

    Raises:
        ConfigError: if braces do not match, hold anything but a plain name, or are nowhere.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{{{ and }}}} for literal braces") from None
    for _, name, specification, conversion in pieces:
        if name is not None and (not name or specification or conversion or set(name) & set(".[]")):
            raise ConfigError(f"template {template!r} may hold only plain names in braces, such as {{text}}")
    if all(name is None for _, name, _, _ in pieces):
        raise ConfigError(f"template {template!r} names no field, such as {{text}}: every prompt would be the same")
    return [(literal, name) for literal, name, _, _ in pieces]
