"""What export refuses.

HemiolaError
└── ExportError              a model, scheduler or schedule that cannot be exported
    └── UnsupportedSolverError    a scheduler that is no fixed linear map: stochastic, clipping, thresholding
"""

from hemiola_runtime.errors import HemiolaError


class ExportError(HemiolaError):
    """A model, scheduler or schedule cannot be exported."""


class UnsupportedSolverError(ExportError):
    """A scheduler is not a fixed linear map of the sample and the model outputs."""
