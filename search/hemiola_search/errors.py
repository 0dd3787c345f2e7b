"""What search refuses.

HemiolaError
└── SearchError              constraints that no schedule meets, or a judge that cannot be used
"""

from hemiola_runtime.errors import HemiolaError


class SearchError(HemiolaError):
    """Constraints that no schedule meets, or a judge that cannot be used."""
