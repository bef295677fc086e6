"""Fill the marked blocks of a document."""

import re
from collections.abc import Callable

from fpn_ablate.utils.errors import UserError


def fill_blocks(text: str, marker: str, make: Callable[[str], str]) -> str:
    """Fill each block of a document, from the line `<!-- KIND: ARGUMENT -->` to `<!-- /KIND -->`, with `make(ARGUMENT)`.

    Args:
        marker: "KIND: ARGUMENT", with the word for the argument that messages use; "KIND" alone if blocks have none.

    Raises:
        UserError: there is no such block, or one is not closed.
    """
    kind = marker.partition(":")[0]
    last = f"<!-- /{kind} -->"
    filled, *parts = re.split(rf"<!-- ({kind}(?::[^\n]*?)?) -->", text)
    if not parts:
        raise UserError(f"no '<!-- {marker} -->' ... '{last}' block to fill")
    for first, rest in zip(parts[::2], parts[1::2], strict=True):
        _, closing, after = rest.partition(last)
        if not closing or not rest.startswith("\n"):
            raise UserError(f"'<!-- {first} -->' must end its line and have a '{last}' after it")
        filled += f"<!-- {first} -->\n{make(first.partition(':')[2].strip())}{last}{after}"
    return filled
