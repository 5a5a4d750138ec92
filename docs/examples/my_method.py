"""A method of your own: python -m mat_dist.train --plugin docs/examples/my_method.py methods.centralise={}

Gradient centralisation (Yong et al., "Gradient Centralization", ECCV 2020): the gradient of each filter loses its mean.
"""

from pydantic import Field

from mat_dist.config.fields import Section
from mat_dist.config.methods import Method, register_method
from mat_dist.core.hooks import Hook


class CentraliseConfig(Section):
    """The settings, methods.centralise.<name>: a description, a default, a range."""

    linear: bool = Field(False, description="also for linear layers")


class Centralise(Hook):
    """What the method adds to one peer. A hook has a verb for each moment of a step; this one needs a single one."""

    name = "centralise"

    def after_reduce(self) -> None:
        """The gradients of the step are complete, and clipped next."""
        least = 2 if self.peer.spec.methods["centralise"].linear else 4
        for gradient in self.peer.gradients():
            if gradient.ndim >= least:
                gradient.sub_(gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True))


register_method(Method("centralise", "gradients of filters without their mean", section=CentraliseConfig,
                       hook=Centralise))
