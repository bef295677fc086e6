"""Replace a marked block of a document."""

from fpn_ablate.utils.errors import UserError


def fill_block(text: str, name: str, body: str) -> str:
    """A document's `text` with `body` between the lines `<!-- name -->` and `<!-- /name -->`.

    Raises:
        UserError: these lines are missing, or are there more than once.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(first)
    _, closed, after = rest.partition(last)
    if not closed or first in rest:
        raise UserError(
            f"one block '<!-- {name} -->', at the end of its line, with a '{last}' after it, must be in the document"
        )
    return before + found + body + closed + after
