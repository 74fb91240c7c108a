"""From settings to a loaded model: the one place that chooses which path serves it."""

from worker.engine.loaded import LoadedModel
from worker.settings import WorkerSettings

ECHO = "echo"


def load_model(settings: WorkerSettings) -> LoadedModel:
    """Load what `--model-id` names. Imports torch only when the model needs it.

    Raises FleetError with one sentence when the model can not be found, read or run here.
    """
    if settings.model_id == ECHO:
        from worker.engine.echo import load_echo

        return load_echo(settings)
    from worker.engine.engine import build_engine

    return build_engine(settings)
