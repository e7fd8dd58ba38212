"""RMSprop as a torch optimizer, for training with one worker or many."""

from hogstream.optim.interchange import export_state, import_state
from hogstream.optim.rmsprop import RMSprop
from hogstream.optim.rmsprop_async import RMSpropAsync

__all__ = ["RMSprop", "RMSpropAsync", "export_state", "import_state"]
