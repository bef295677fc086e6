"""How times are written for people."""

import pytest

from fpn_ablate.utils.console import about, coarse_duration, duration


@pytest.mark.parametrize(
    ("seconds", "exact", "coarse", "estimated"),
    [
        (-1, "0:00", "0 s", "about 10 s"),
        (7.4, "0:07", "7 s", "about 10 s"),
        (43, "0:43", "43 s", "about 40 s"),
        (86, "1:26", "86 s", "about 90 s"),
        (90, "1:30", "2 min", "about 2 min"),
        (750, "12:30", "12 min", "about 12 min"),
        (3723, "1:02:03", "62 min", "about 62 min"),
        (9000, "2:30:00", "2.5 h", "about 2.5 h"),
    ],
)
def test_a_time_is_written_exactly_coarsely_or_as_an_estimate(seconds, exact, coarse, estimated):
    assert (duration(seconds), coarse_duration(seconds), about(seconds)) == (exact, coarse, estimated)
