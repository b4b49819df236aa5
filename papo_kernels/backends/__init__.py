"""What computes: the protocol, the choice, and one module or package a backend."""

from .choice import BACKENDS, choose, named
from .protocol import Backend, Capabilities

__all__ = ["BACKENDS", "Backend", "Capabilities", "choose", "named"]
