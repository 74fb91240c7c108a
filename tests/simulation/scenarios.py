"""What may happen in a history, by name: what `python -m tests.simulation` and the tests play."""

from dataclasses import dataclass, field, replace

from tests.simulation.network import Weather


@dataclass(slots=True)
class Scenario:
    """What may happen in a history. Rates are per virtual second, over the whole fleet."""

    num_workers: int = 2
    num_gateways: int = 2
    num_streams: int = 4
    max_new_tokens: int = 10
    step_s: float = 0.05
    weather: Weather = field(default_factory=Weather)
    kill_worker: float = 0.0
    stop_worker: float = 0.0  # SIGSTOP for up to 1.7 leases
    drain_worker: float = 0.0
    kill_gateway: float = 0.0
    cut_all: float = 0.0
    pause_broker: float = 0.0
    restart_broker: float = 0.0  # nothing is lost but the script cache
    roll_back: float = 0.0  # restart with what it held up to 2 s ago
    wipe: float = 0.0
    flush_scripts: float = 0.0
    leave: float = 0.0  # share of the streams whose client goes away
    restores: bool = True  # gateways give back what the broker lost


# The rates above, each a method of `World` by its name with an underscore before it.
FAULTS = (
    "kill_worker",
    "stop_worker",
    "drain_worker",
    "kill_gateway",
    "cut_all",
    "pause_broker",
    "restart_broker",
    "roll_back",
    "wipe",
    "flush_scripts",
)

BAD_WEATHER = Weather(cut_before=0.01, cut_after=0.01, ghost=0.3, lose_message=0.02)
SCENARIOS: dict[str, Scenario] = {
    "calm": Scenario(),
    "bad network": Scenario(weather=replace(BAD_WEATHER, cut_before=0.03, cut_after=0.03)),
    "processes die": Scenario(
        kill_worker=0.4, stop_worker=0.3, drain_worker=0.3, kill_gateway=0.3, leave=0.1
    ),
    "broker trouble": Scenario(
        cut_all=0.3, pause_broker=0.2, restart_broker=0.2, flush_scripts=0.1, weather=BAD_WEATHER
    ),
    "broker loses its tail": Scenario(roll_back=0.2, weather=BAD_WEATHER),
    "broker loses all": Scenario(wipe=0.2, kill_gateway=0.1),
    "everything": Scenario(
        num_workers=3,
        num_streams=6,
        weather=BAD_WEATHER,
        kill_worker=0.3,
        stop_worker=0.3,
        drain_worker=0.2,
        kill_gateway=0.2,
        cut_all=0.3,
        pause_broker=0.1,
        restart_broker=0.1,
        roll_back=0.1,
        wipe=0.03,
        flush_scripts=0.1,
        leave=0.1,
    ),
}
