"""The backends: the protocol that they share, which of them serves a call, and their modules.

`cpu` and `cuda` are both in ``native.py``, on the compiled extension.
"""

from .choice import BACKENDS, choose, named
from .protocol import Backend, Capabilities

__all__ = ["BACKENDS", "Backend", "Capabilities", "choose", "named"]
