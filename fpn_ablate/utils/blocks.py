"""Replace a marked block of a document."""

from fpn_ablate.utils.errors import UserError


def fill_block(text: str, name: str, body: str) -> str:
    """Replace what stands between the lines `<!-- name -->` and `<!-- /name -->` of a document by `body`.

    Raises:
        UserError: the document has no such block, or more than one.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, opening, rest = text.partition(first)
    _, closing, after = rest.partition(last)
    if not closing or first in rest:
        raise UserError(
            f"the document must have exactly one block '<!-- {name} -->' ... '{last}'; the first marker must end its line"
        )
    return before + opening + body + closing + after
