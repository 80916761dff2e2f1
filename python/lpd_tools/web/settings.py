"""What `lpd demo` can be told. No library of its own is imported here: `lpd --help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.listening import Listening
from lpd_tools.settings import setting


@dataclass(frozen=True)
class Demo(Listening):
    """The page of a model."""

    port: int = setting(7860)
