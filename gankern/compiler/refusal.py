"""Why there is no plan."""

from __future__ import annotations


class Refused(Exception):
    """Something about a critic or a call that no plan can follow or check; the text says what."""
