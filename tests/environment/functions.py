"""A reward function of a session's whole text."""


def last(text, gold, row):
    return float(text.strip().endswith("1"))
