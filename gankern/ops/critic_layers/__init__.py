"""Layers of critics whose second derivatives cost only what is needed.

Stock autograd returns tensors of zeros as the second derivative of ReLU, and drives them through the whole forward
graph; it also computes weight gradients in an inner gradient that only wants the input's. The functions here return
None for what is identically zero, and leave out weight gradients while :class:`Scope` says so.

They are drop-in replacements of the functions of the same name in :mod:`torch.nn.functional`, differentiable to any
order; :class:`CriticLayers` puts them in their place while a critic runs.
"""

from gankern.ops.critic_layers.intercept import CriticLayers
from gankern.ops.critic_layers.scope import Scope

__all__ = ["CriticLayers", "Scope"]
