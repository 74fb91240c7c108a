"""Every error a caller can meet, as one tree. The class docstring is the default message.

    FleetError
    ├── ValidationError        422  the request breaks a rule; the message states rule and value
    │   └── IdempotencyConflict 422  the key of a retry was used for another request
    ├── MalformedRequest       400  the body is not JSON
    ├── ModelNotFound          404  no such model is served
    ├── RequestNotFound        404  no such request is known, or it ended too long ago
    ├── PayloadTooLarge        413  the body is longer than the limit
    ├── RequestTimedOut        408  the client took too long to send it
    ├── Overloaded             429  the queue is full, try later
    │   └── RateLimited        429  the client's key has used what it may
    ├── GenerationFailed       424  the worker failed on this request
    │   └── DeadlineExceeded   424  the request did not finish in time
    ├── Cancelled              499  the client asked for the end (never seen by that client)
    └── Unavailable            503  no broker or no worker can be reached now

`kind` is the `error_type` in a body and the label in metrics; `is_retryable` tells a client to repeat the request.
"""


class FleetError(Exception):
    """Something went wrong."""

    kind = "internal"
    http_status = 500
    is_retryable = False

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().rstrip("."))


class ValidationError(FleetError):
    """Input validation error."""

    kind = "validation"
    http_status = 422

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param  # the field of the body that is meant


class MalformedRequest(FleetError):
    """The request body is not valid JSON."""

    kind = "malformed_request"
    http_status = 400


class ModelNotFound(FleetError):
    """The model is not served here."""

    kind = "model_not_found"
    http_status = 404


class RequestNotFound(FleetError):
    """No such request is known here, or it ended too long ago."""

    kind = "request_not_found"
    http_status = 404


class IdempotencyConflict(ValidationError):
    """The `Idempotency-Key` was used for another request; send the same body, or choose a new key."""

    kind = "idempotency_conflict"


class PayloadTooLarge(FleetError):
    """The request body is too large."""

    kind = "payload_too_large"
    http_status = 413


class Overloaded(FleetError):
    """Model is overloaded."""

    kind = "overloaded"
    http_status = 429
    is_retryable = True

    def __init__(self, message: str = "", *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The key has used what it may; try later."""

    kind = "rate_limited"


class RequestTimedOut(FleetError):
    """The request did not arrive in time."""

    kind = "request_timeout"
    http_status = 408


class GenerationFailed(FleetError):
    """Request failed during generation."""

    kind = "generation"
    http_status = 424


class DeadlineExceeded(GenerationFailed):
    """The request did not finish before its deadline."""

    kind = "deadline"


class Cancelled(FleetError):
    """The request was cancelled."""

    kind = "cancelled"
    http_status = 499


class Unavailable(FleetError):
    """The service cannot answer right now."""

    kind = "unavailable"
    http_status = 503
    is_retryable = True


def error_of_kind(kind: str, message: str) -> FleetError:
    """The error that a `Failure` names; a kind that this version does not know is a failed generation."""
    for cls in (DeadlineExceeded, Cancelled, Overloaded, Unavailable, ValidationError):
        if cls.kind == kind:
            return cls(message)
    return GenerationFailed(message)
