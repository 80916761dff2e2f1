"""Settings of `lpd demo`. Imports no heavy library: `lpd --help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.listening import Listening
from lpd_tools.settings import setting


@dataclass(frozen=True)
class Demo(Listening):
    """Settings of the page and its model."""

    port: int = setting(7860)
