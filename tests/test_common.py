"""What every part of the package shares."""

import pytest

from fastgpt.common import gigabytes, millions, percent, rounded, teraflops


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (5_200_000, "5.2M"),
        (999_600_000, "1B"),
        (10_485_760_000, "10.5B"),
        (1.21e12, "1.21T"),
        (2.5e14, "250T"),
    ],
)
def test_counts_have_three_digits_and_a_letter(number, text):
    assert rounded(number) == text


def test_figures_carry_their_unit():
    assert rounded(1.234e9, "kMGT", " ") + "B" == "1.23 GB" and rounded(12, "kMGT", " ") + "B" == "12 B"
    assert (millions(123_587_328), gigabytes(5.17e9), gigabytes(5.17e9, 2)) == ("123.59M", "5.2 GB", "5.17 GB")
    assert (teraflops(58.31e12), percent(0.12894), percent(None)) == ("58.3 TFLOP/s", "12.9%", "n/a")
