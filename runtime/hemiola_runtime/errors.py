"""What can go wrong, as classes that each stand for one decision of the caller.

HemiolaError                 anything Hemiola refuses or fails at, on purpose
├── ScheduleError            a schedule is malformed, or made for something else   → search again
├── BundleError              a bundle is malformed, or not for this machine        → build again
│   └── IntegrityError       its bytes are not those that were built               → fetch or build again
├── RequestError             the request asks for what the bundle cannot do        → change the request
├── CapacityError            it does not fit into this machine's memory            → smaller batch, other machine
├── DeviceError              the GPU or its driver failed                          → start the process again
├── CancelledError           the caller cancelled the request                      → nothing to mend
├── NumericError             NaN or infinity appeared on the way                   → precision, or a bug
└── EngagementError          other forwards ran than the schedule names            → a bug: please report it
"""


class HemiolaError(Exception):
    """Anything Hemiola refuses or fails at on purpose; its message says what, why, and how to mend it."""


class ScheduleError(HemiolaError):
    """A schedule is malformed, or was made for another model, scheduler, step count or resolution."""


class BundleError(HemiolaError):
    """A bundle is malformed, or was not built for this machine."""


class IntegrityError(BundleError):
    """The bytes of a bundle are not those that were built."""


class RequestError(HemiolaError, ValueError):
    """A request asks for something the bundle cannot do."""


class CapacityError(HemiolaError):
    """What was asked for does not fit into this machine's memory."""


class DeviceError(HemiolaError):
    """The GPU or its driver failed while it was used."""


class CancelledError(HemiolaError):
    """The caller cancelled the request between two steps."""


class NumericError(HemiolaError):
    """NaN or infinity appeared in the course of a request."""


class EngagementError(HemiolaError):
    """Other forwards ran than the schedule names; the cache did not engage as promised."""
