"""The depth of every pixel with a distilled student: a decoder, a scale-invariant loss, tests."""
