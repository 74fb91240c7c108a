"""What handlers need, in one typed place: `request.app[SERVICES]`. Made by `gateway.app`, replaced by tests."""

from dataclasses import dataclass, field

from aiohttp import web
from opentelemetry.trace import Tracer

from gateway.admission import Admission
from gateway.broker_health import BrokerHealth
from gateway.exposition import SharedMetrics
from gateway.generation import Generator
from gateway.key_limits import KeyLimits
from gateway.metrics import GatewayMetrics
from gateway.model_directory import ModelDirectory
from gateway.outbox import Outbox
from gateway.request_finder import RequestFinder
from gateway.settings import GatewaySettings


@dataclass(slots=True)
class Services:
    """The collaborators of one gateway process."""

    settings: GatewaySettings
    directory: ModelDirectory
    generator: Generator
    finder: RequestFinder
    admission: Admission
    limits: KeyLimits
    broker: BrokerHealth
    metrics: GatewayMetrics
    shared_metrics: SharedMetrics
    tracer: Tracer
    outbox: Outbox = field(default_factory=Outbox)
    is_draining: bool = False


SERVICES = web.AppKey("services", Services)
