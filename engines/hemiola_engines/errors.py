"""What building refuses.

HemiolaError
└── BuildError               graphs that cannot be built, or engines that do not compute what PyTorch computes
"""

from hemiola_runtime.errors import HemiolaError


class BuildError(HemiolaError):
    """Graphs cannot be built, or the engines do not compute what PyTorch computes."""
