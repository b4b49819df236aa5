"""Decimal numbers as text. No torch here: reward workers import this file."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

_LARGEST_EXPONENT = 400


def positional(number: str) -> str:
    """A decimal number without exponent and trailing zeros, by exact arithmetic.

    It comes back as it is where its exponent is beyond 400.
    """
    try:
        value = Decimal(number)
    except InvalidOperation:  # its exponent is beyond a decimal's
        return number
    if abs(value.adjusted()) > _LARGEST_EXPONENT:
        return number
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if value == 0 else text
