"""`tokenfleet worker`. Imports torch only once its options have been read, and never in the launcher of
shards."""

import os

import click
from click.core import ParameterSource

from common.cli import explained_imports
from common.settings import options_from
from worker.settings import WorkerSettings


@click.command()
@options_from(WorkerSettings)
def worker(settings: WorkerSettings) -> None:
    """Load a model and generate what the queue holds, until SIGTERM: then finish, hand over the rest and end."""
    context = click.get_current_context()
    with explained_imports("worker"):
        context.exit(_run(settings, context))


def _run(settings: WorkerSettings, context: click.Context) -> int:
    """This process is a whole worker, the launcher of several shards, or one of these."""
    # OpenMP reads this when torch is imported. Its threads would spin for milliseconds on the cores
    # that our own kernels' threads (worker/kernels/cpu/parallel.h) and the gateway need. A default
    # for a library, which reads no setting of ours:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if settings.num_shard > 1 and settings.shard_rank is None:
        from worker.parallel.launch import run_group

        source = context.get_parameter_source
        given = {name for name in context.params if source(name) == ParameterSource.COMMANDLINE}
        return run_group(settings, given)
    if settings.shard_rank:
        from worker.engine.sharded import run_follower

        return run_follower(settings)
    from worker.service.worker import run

    return run(settings)
