"""From settings to a loaded model: the one place that chooses which path serves it."""

from common.errors import FleetError
from worker.engine.loaded import LoadedModel
from worker.settings import WorkerSettings

ECHO = "echo"


def load_model(settings: WorkerSettings) -> LoadedModel:
    """Load what `--model-id` names. Imports torch only when the model needs it.

    Raises FleetError with one sentence when the model can not be found, read or run here.
    """
    if settings.model_id == ECHO:
        from worker.engine.echo import load_echo

        if settings.num_shard > 1:
            raise FleetError(
                "`num_shard` must be 1 with the echo model, which has nothing to share"
            )
        if settings.quantize is not None:
            raise FleetError("`quantize` must be absent with the echo model, which has no weights")
        return load_echo(settings)
    if settings.num_shard > 1:
        from worker.engine.sharded import load_sharded

        return load_sharded(settings)
    from worker.engine.engine import build_engine

    return build_engine(settings)
