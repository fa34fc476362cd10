"""Layers of critics whose second derivatives cost only what is needed.

Stock autograd returns tensors of zeros as the second derivative of ReLU, and drives them through the whole forward
graph; it also computes weight gradients in an inner gradient that only wants the input's. The functions here return
None for what is identically zero, and leave out weight gradients while :class:`Scope` says so.

They take the place of modules of torch's own in critics that are plain: see ``chain.py`` beside this.
"""

from gankern.ops.critic_layers.chain import Chain, Declined, find
from gankern.ops.critic_layers.scope import Scope

__all__ = ["Chain", "Declined", "Scope", "find"]
