"""Marked blocks of a document: what is filled, and what is refused."""

import pytest

from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.errors import UserError


def test_each_block_is_filled_for_its_argument_and_all_else_stays():
    text = "a\n<!-- x: one -->\nold\n<!-- /x -->\n<!-- xy -->\n<!-- x: 2 3 -->\n<!-- /x -->\n<!-- x -->\n<!-- /x -->b"
    filled = fill_blocks(text, "x: WORD", lambda argument: f"[{argument}]\n")
    assert filled == (
        "a\n<!-- x: one -->\n[one]\n<!-- /x -->\n<!-- xy -->\n<!-- x: 2 3 -->\n[2 3]\n<!-- /x -->\n<!-- x -->\n[]\n<!-- /x -->b"
    )
    assert fill_blocks(filled, "x: WORD", lambda argument: f"[{argument}]\n") == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- y -->\n<!-- /y -->", "no '<!-- x: WORD -->' ... '<!-- /x -->' block to fill"),
        ("<!-- x: a -->", "'<!-- x: a -->' must end its line"),
        ("<!-- x: a -->\n", "'<!-- x: a -->' must end its line and have a '<!-- /x -->' after it"),
        ("<!-- x: a --> b\n<!-- /x -->", "'<!-- x: a -->' must end its line"),
        ("<!-- x: a -->\n<!-- x: b -->\n<!-- /x -->", "'<!-- x: a -->' must end its line"),
        ("<!-- x: a -->\n<!-- /x -->\n<!-- x: b -->\n", "'<!-- x: b -->' must end its line"),
    ],
)
def test_a_document_without_a_block_or_with_an_open_one_is_refused(text, message):
    with pytest.raises(UserError) as error:
        fill_blocks(text, "x: WORD", str)
    assert str(error.value).startswith(message)
