"""Files from elsewhere that parse but make no model: sizes that cannot be, values of other types, deep nesting."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from shadowtune.errors import CheckpointError, ShadowtuneError

MOST_BLOCKS = 10_000
"""Blocks of a network. transformers makes lists of this length before anything else looks at the number."""
LARGEST = 2**31 - 1
"""Any other number of a config."""
LONGEST = 300
"""Characters of a library's message; some list every architecture."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Context in which a model is made from a file: whatever fails there, the file's contents are at fault.

    Args:
        what: beginning of the message, such as "cannot read config.json of a directory".

    Raises:
        CheckpointError: in one line.
    """
    try:
        yield
    except ShadowtuneError:
        raise
    # Validation of transformers, its classes and torch fail in errors of a dozen kinds, some of them bare Exceptions.
    except Exception as error:
        raise CheckpointError(f"{what}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """Return an error's message as one line that is not too long; its kind where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def check_numbers(values: Any, what: str, path: str = "") -> None:
    """Refuse numbers of a config that no model has, before anything reserves memory for them.

    Raises:
        CheckpointError: naming the key and its value.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_numbers(value, what, f"{path}.{name}" if path else str(name))
    elif isinstance(values, int) and not isinstance(values, bool):
        limit = MOST_BLOCKS if path.endswith(("layers", "n_layer")) else LARGEST
        if not -LARGEST <= values <= limit:
            raise CheckpointError(f"{what}: {path} is {values}, more than any model has")
