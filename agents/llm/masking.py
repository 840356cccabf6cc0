"""Masking: text from an endpoint for logs and files, without our secrets, printable and short. Pure."""

import base64
import json
from collections.abc import Iterable, Iterator
from urllib.parse import quote

HIDDEN = "***"
SHORTEST_SECRET = 8
"""Minimum number of characters of a key that is hidden. A shorter key is a placeholder for a local server (`none`,
`0`), and hiding it would change the numbers of an answer."""
LONGEST_SHOWN = 300
"""Maximum number of characters of a reason that are shown."""
LONGEST_LOOK = 10 * LONGEST_SHOWN
"""Maximum number of characters of a reason that are searched for printable characters."""


class Masking:
    """Hides the secrets of one endpoint in text that it sends back, in all encodings that servers use."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets if len(secret) >= SHORTEST_SECRET for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)

    def masked(self, text: str) -> str:
        """Return `text` without the secrets."""
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        return text

    def shown(self, text: str) -> str:
        """Return one short line of printable characters, without secrets and without escape sequences of terminals.

        Secrets are hidden before the text is cut, so that no part of one is left.
        """
        line = " ".join(self.masked(text)[:LONGEST_LOOK].split())
        return "".join(character for character in line if character.isprintable())[:LONGEST_SHOWN]


def _forms(secret: str) -> Iterator[str]:
    """Yield the secret unchanged, in JSON, in a URL, and in base64."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield quote(secret, safe="")
    yield base64.b64encode(secret.encode()).decode().rstrip("=")
    yield base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")
