"""The one error a user of lever sees: what went wrong, where, which value, what to do next."""

from __future__ import annotations


class LeverError(Exception):
    """A problem with the user's data, files or request.

    The command line prints it as ``Error: …`` and ``Hint: …`` and exits with ``exit_code``.

    Args:
        what: one sentence that names the problem.
        where: the place: a file, a byte offset, a query id, a column.
        value: the offending value, shown shortened.
        hint: what the user can do next.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        value: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.value = value
        self.hint = hint
        super().__init__(self.message())

    def message(self) -> str:
        """The error on one line, without the hint."""
        parts = [self.what]
        if self.where is not None:
            parts.append(f"at {self.where}")
        if self.value is not None:
            parts.append(f"value {shorten(self.value)}")
        return "; ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.value, self.hint))


class UsageError(LeverError):
    """The request itself is malformed (a bad flag, an unknown name): exit code 2."""

    exit_code = 2


def shorten(value: object, limit: int = 120) -> str:
    """``repr`` of a value, cut in the middle where it is longer than ``limit`` characters.

    Bytes are shown as the text they are, what is not UTF-8 escaped.
    """
    text = repr(value.decode(errors="backslashreplace") if isinstance(value, bytes) else value)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def reason(error: Exception) -> str:
    """What a library says went wrong: of the system's errors the words, without number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _rebuild(
    cls: type[LeverError], what: str, where: str | None, value: object, hint: str | None
) -> LeverError:
    return cls(what, where=where, value=value, hint=hint)
