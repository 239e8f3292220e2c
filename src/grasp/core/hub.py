"""Can the Hugging Face hub be reached? Asked once before a name goes there, so that a machine
without network hears so at once.

(The hub's client tries six times, over half a minute, before it gives up.)
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


def reachable() -> bool:
    """False where the hub's name cannot be looked up, or offline mode is on. Behind a proxy the
    answer is True: it looks names up itself.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
