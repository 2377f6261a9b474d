"""Units of measure in word problems: conversion factors, aliases, and the words of a text."""

import re

# (factor, small unit, large unit): `factor` small units make one large unit. The unit "" matches
# every text, so a factor of 100 requires only that a percentage is mentioned.
TIME = (
    (60, "second", "minute"),
    (3600, "second", "hour"),
    (60, "minute", "hour"),
    (1440, "minute", "day"),
    (24, "hour", "day"),
    (7, "day", "week"),
    (30, "day", "month"),
    (365, "day", "year"),
    (4, "week", "month"),
    (52, "week", "year"),
    (12, "month", "year"),
    (10, "year", "decade"),
    (100, "year", "century"),
)
MONEY = (
    (5, "cent", "nickel"),
    (10, "cent", "dime"),
    (25, "cent", "quarter"),
    (100, "cent", "dollar"),
)
MEASURES = (
    (12, "inch", "foot"),
    (36, "inch", "yard"),
    (3, "foot", "yard"),
    (5280, "foot", "mile"),
    (1760, "yard", "mile"),
    (10, "millimeter", "centimeter"),
    (100, "centimeter", "meter"),
    (1000, "meter", "kilometer"),
    (16, "ounce", "pound"),
    (2000, "pound", "ton"),
    (1000, "milligram", "gram"),
    (1000, "gram", "kilogram"),
    (1000, "milliliter", "liter"),
    (8, "ounce", "cup"),
    (128, "ounce", "gallon"),
    (2, "cup", "pint"),
    (16, "cup", "gallon"),
    (2, "pint", "quart"),
    (8, "pint", "gallon"),
    (4, "quart", "gallon"),
    (12, "", "dozen"),
)
CONVERSIONS = TIME + MONEY + MEASURES + ((100, "", "percent"),)
ALIASES = {  # plurals in -s are added below
    "feet": "foot", "ft": "foot", "inches": "inch", "km": "kilometer", "cm": "centimeter",
    "mm": "millimeter", "m": "meter", "metre": "meter", "metres": "meter", "kilo": "kilogram",
    "kg": "kilogram", "g": "gram", "mg": "milligram", "ml": "milliliter", "l": "liter",
    "litre": "liter", "litres": "liter", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "hr": "hour", "hrs": "hour", "hourly": "hour", "min": "minute", "mins": "minute",
    "sec": "second", "secs": "second", "daily": "day", "weekly": "week",
    "monthly": "month", "yearly": "year", "annual": "year", "annually": "year",
    "centuries": "century", "$": "dollar", "¢": "cent", "penny": "cent", "pennies": "cent",
    "%": "percent", "percentage": "percent",
}  # fmt: skip
ALIASES |= {f"{unit}s": unit for _, *pair in CONVERSIONS for unit in pair if unit}
# In word problems "second" is usually an ordinal, and "quarters" are usually fourths.
ALIASES |= {"second": "2nd", "quarters": "quarters"}

_WORD = re.compile(r"[0-9]+/[0-9]+|[0-9][0-9,.]*|[ap]\.m\b|[^\W\d_]+(?:['’][^\W\d_]+)*|[$%¢€£]")


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, one name per unit, "#" and "#/#" for numbers."""
    words = []
    for match in _WORD.finditer(text.lower()):
        word = match[0].replace("’", "'")
        if word[0] in "0123456789":
            word = "#/#" if "/" in word else "#"
        words.append(ALIASES.get(word, word))
    return words


def convertible(words: set[str]) -> bool:
    """Whether two units of the same kind, such as hours and minutes, are among `words`."""
    return any(small in words and large in words for _, small, large in CONVERSIONS)
