"""Text from an endpoint, made fit for logs, files and people: without our secrets, printable, and short. Pure."""

import base64
import json
from collections.abc import Iterable, Iterator
from urllib.parse import quote

HIDDEN = "***"
SHORTEST_SECRET = 8
"""Characters. A shorter key is a placeholder of a local server (`none`, `0`): to hide it would change the numbers of an
answer."""
LONGEST_SHOWN = 300
"""Characters of a reason."""
LONGEST_LOOK = 10 * LONGEST_SHOWN
"""Characters that are looked through for the printable ones of a reason."""


class Masking:
    """Hides the secrets of one endpoint, which it may have echoed, in the forms in which servers write them."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets if len(secret) >= SHORTEST_SECRET for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)

    def masked(self, text: str) -> str:
        """Return `text` without the secrets."""
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        return text

    def shown(self, text: str) -> str:
        """Return one short line of printable characters: no secret, no terminal's escapes.

        The secrets go before the text is cut, so that no half of one is left.
        """
        line = " ".join(self.masked(text)[:LONGEST_LOOK].split())
        return "".join(character for character in line if character.isprintable())[:LONGEST_SHOWN]


def _forms(secret: str) -> Iterator[str]:
    """Yield the secret as it is, in JSON, in a URL, and in base64."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield quote(secret, safe="")
    yield base64.b64encode(secret.encode()).decode().rstrip("=")
    yield base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")
