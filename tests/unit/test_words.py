"""Options of a command line."""

from __future__ import annotations

import pytest

from mat_dist.config.words import split, whole_number
from mat_dist.errors import ConfigError


def test_options_are_split_from_the_words_around_them_which_keep_their_order() -> None:
    found = split(["a=1", "--file", "x", "--quick", "--other=2", "--file=y", "b"], {"--file": "FILE"}, ("--quick",))
    assert found.values == {"--file": ("x", "y")} and found.flags == {"--quick"} and not found.problems
    assert found.rest == ("a=1", "--other=2", "b")
    assert found.last("--file") == "y" and found.last("--none") is None


@pytest.mark.parametrize("words,told", [
    (["--file"], "--file without a value"), (["--file="], "--file without a value"),
    (["--file", "--quick"], "--file '--quick'"), (["--file=-1"], "--file '-1'"),
])
def test_an_option_without_its_value_is_told_with_what_to_write(words: list[str], told: str) -> None:
    (problem,) = split(words, {"--file": "FILE"}, ("--quick",)).problems
    assert told in str(problem) and "write --file FILE" in str(problem)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "", "x", "²", "10000000", "00000001"])
def test_what_is_no_count_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="--ranks"):
        whole_number("--ranks", value)
    assert whole_number("--ranks", "9999999") == 9_999_999
