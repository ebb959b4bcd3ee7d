"""The tiny tokenizer of the unit tests."""

from tests.unit.conftest import tokenizer  # noqa: F401 - a fixture
