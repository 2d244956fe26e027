"""The key of an endpoint: read from the environment, sent in a header, shown to nobody.

In goes ``OPENAI_API_KEY``; out come the request's header, and texts without the key.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from urllib.parse import quote

from lever_data.errors import UsageError

KEY_VARIABLE = "OPENAI_API_KEY"
# Servers that want no key are given a word such as "none" or "EMPTY"; those are no secrets, and
# may well be what a model answers
_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class ApiKey:
    """A key that a header can carry, or none (``""``). Make one with :meth:`read`."""

    value: str = field(default="", repr=False)

    @classmethod
    def read(cls) -> ApiKey:
        """The key of the environment, without the whitespace around it (a file's newline).

        Raises:
            UsageError: no header can carry it; the message does not show it.
        """
        given = os.environ.get(KEY_VARIABLE, "")
        value = given.strip()
        if given and not value:
            raise UsageError(
                f"{KEY_VARIABLE} holds only whitespace",
                hint=f"unset {KEY_VARIABLE} where the endpoint wants no key",
            )
        if not all("!" <= c <= "~" for c in value):
            raise UsageError(
                f"{KEY_VARIABLE} holds whitespace or characters beyond ASCII, which no key has",
                hint=f"export {KEY_VARIABLE}=… again, with nothing but the key",
            )
        return cls(value)

    def headers(self) -> dict[str, str]:
        """What proves the key to the endpoint."""
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}

    def out_of(self, message: str) -> str:
        """A message without the key, which an endpoint or a library may repeat in it."""
        for form in self._forms():
            message = message.replace(form, "***")
        return message

    def out_of_answer(self, text: str) -> str:
        """A model's answer without the key, unless that is too short to be a secret."""
        return self.out_of(text) if len(self.value) >= _SHORTEST_SECRET else text

    def _forms(self) -> list[str]:
        """The ways a text may spell the key, longest first: as it is, quoted, in JSON, in a URL."""
        if not self.value:
            return []
        in_json = json.dumps(self.value)[1:-1]
        forms = {self.value, repr(self.value)[1:-1], in_json, in_json.replace("/", "\\/")}
        return sorted(forms | {quote(self.value, safe="")}, key=len, reverse=True)
