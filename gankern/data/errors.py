"""The error that every loader raises."""

from __future__ import annotations

from gankern._files import FileError


class DataError(FileError):
    """A data set is missing or broken; one line names the path, what was expected and what was found."""
