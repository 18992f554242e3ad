"""One hierarchy of errors. Each knows its code, its gRPC status and its HTTP status.

The message says what is wrong, why, and what to do; it is safe to show to a client.
"""

from __future__ import annotations

from typing import ClassVar, Self

import grpc


class PenumbraError(Exception):
    """Root of every error that may leave a process."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    retryable: ClassVar[bool] = False
    """Whether another worker, or the same one later, may succeed with the same request."""
    retry_after_s: float | None = None
    """After how long the same request may succeed, where that could be computed; 0: never."""

    def after(self, seconds: float) -> Self:
        """The same error, telling when to come again."""
        self.retry_after_s = seconds
        return self


class ConfigError(PenumbraError):
    """A configuration that cannot run. Processes exit 78 with this message on one line."""

    code = "bad_config"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    exit_code: ClassVar[int] = 78


class CheckpointError(ConfigError):
    """A checkpoint that cannot be served; the message names the file and, where there is one, the tensor."""

    code = "bad_checkpoint"


class InvalidRequest(PenumbraError):
    """The client's fault; never retried."""

    code = "invalid_request"
    http_status = 400
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.detail_code = code or self.code


class ModelNotFound(PenumbraError):
    code = "model_not_found"
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND


class InvalidKey(PenumbraError):
    """No API key, or one that opens nothing."""

    code = "invalid_api_key"
    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED


class NotAllowed(PenumbraError):
    """A key that opens other doors, but not this one."""

    code = "permission_denied"
    http_status = 403
    grpc_status = grpc.StatusCode.PERMISSION_DENIED


class RateLimited(PenumbraError):
    """A tenant has used what it may use; others are served."""

    code = "rate_limit_exceeded"
    http_status = 429
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED


class QueueTimeout(PenumbraError):
    """The request waited for room as long as it may, and nothing was computed for it."""

    code = "queue_timeout"
    http_status = 408
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED


class WouldWait(PenumbraError):
    """The client wants no place in the queue, and there is no room without one."""

    code = "would_wait"
    http_status = 412
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED


class BodyTooLarge(PenumbraError):
    code = "body_too_large"
    http_status = 413
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED


class NoWorkers(PenumbraError):
    """No usable prefill-decode pair right now."""

    code = "no_workers"
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class Overloaded(PenumbraError):
    """A worker or the router has no room; try again later."""

    code = "overloaded"
    http_status = 503
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class Draining(PenumbraError):
    code = "draining"
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class StreamGone(PenumbraError):
    """An answer that was to be read again is not kept any more, or never was."""

    code = "stream_gone"
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND


class IdempotencyMismatch(PenumbraError):
    """One Idempotency-Key for two different requests."""

    code = "idempotency_mismatch"
    http_status = 409
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class WorkerLost(PenumbraError):
    """The other side died, froze or restarted."""

    code = "worker_lost"
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class ClaimRefused(PenumbraError):
    """Unknown request, wrong secret, or pages that are gone."""

    code = "claim_refused"
    http_status = 503
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    retryable = True


class LayoutMismatch(PenumbraError):
    """Two workers whose pages are not byte for byte the same kind."""

    code = "layout_mismatch"
    http_status = 503
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    retryable = True


class StaleAttempt(PenumbraError):
    code = "stale_attempt"
    http_status = 503
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class TransferFailed(PenumbraError):
    """A read did not finish in time, or its bytes did not match their checksum."""

    code = "transfer_failed"
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class NumericalError(PenumbraError):
    """The model produced NaN or infinite logits for this request."""

    code = "numerical_error"
    retryable = True


class Superseded(PenumbraError):
    """Another process has taken this worker's name since; whoever started last keeps it."""

    code = "superseded"
    http_status = 503
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class RequestQuarantined(PenumbraError):
    """Workers died of this request. It, and whatever asks the same, is refused for a while."""

    code = "request_quarantined"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class GrammarFailed(PenumbraError):
    """The grammar that an answer must follow can not be followed any further, on any worker."""

    code = "grammar_failed"


class DeadlineExceeded(PenumbraError):
    code = "deadline_exceeded"
    http_status = 504
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    retryable = True


class Cancelled(PenumbraError):
    """Whoever asked has left."""

    code = "cancelled"
    http_status = 499
    grpc_status = grpc.StatusCode.CANCELLED
