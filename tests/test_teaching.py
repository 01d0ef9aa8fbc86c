"""Checks of exercises, and pictures to move through."""

import re

import pytest
import torch

from lab7.teaching import check, scrubber


@pytest.mark.parametrize(
    "answer, said",
    [(..., "not answered yet"), (0.5, "right"), (torch.tensor(0.5), "right"), (0.51, "not yet: h")],
)
def test_check(answer, said, capsys):
    check(answer, 0.5, "h")
    assert capsys.readouterr().out == said + "\n"


def test_check_of_a_shape(capsys):
    check(torch.zeros(2), torch.zeros(3), "one for each")
    assert capsys.readouterr().out == "not yet: one for each\n"


def test_scrubber_shows_one_of_all_and_needs_no_script():
    pictures = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    one, other = scrubber(pictures, ["a", "b", "c"]).data, scrubber(-pictures, ["a", "b", "c"]).data
    assert one.count("<img") == 3 and one.count(" checked") == 1 and "<script" not in one
    groups = [set(re.findall('name="(.*?)"', html)) for html in (one, other)]
    assert [len(group) for group in groups] == [1, 1] and groups[0] != groups[1]
