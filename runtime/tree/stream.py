"""Text from tokens as they come."""

from collections.abc import Callable, Sequence


class Printer:
    """Gives out text as soon as it is certain: a character may take several tokens.

    Args:
        decode: Text of tokens.
        write: Takes a piece of text.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self.decode, self.write = decode, write
        self.tokens: list[int] = []
        self._start, self._end = 0, 0  # of the tokens that give the latest text context

    def __call__(self, tokens: Sequence[int]) -> None:
        """Take more tokens."""
        self.tokens += tokens
        before = self.decode(self.tokens[self._start : self._end])
        now = self.decode(self.tokens[self._start :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self.write(now[len(before) :])
            self._start, self._end = self._end, len(self.tokens)

    def end(self) -> None:
        """Give out what is left, complete or not."""
        before = self.decode(self.tokens[self._start : self._end])
        now = self.decode(self.tokens[self._start :])
        if len(now) > len(before):
            self.write(now[len(before) :])
        self._start = self._end = len(self.tokens)
