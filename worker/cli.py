"""`tokenfleet worker`. Imports torch only once its options have been read."""

import click

from common.cli import explained_imports
from common.settings import options_from
from worker.settings import WorkerSettings


@click.command()
@options_from(WorkerSettings)
def worker(settings: WorkerSettings) -> None:
    """Load a model and generate what the queue holds, until SIGTERM: then finish, hand over the rest and end."""
    with explained_imports("worker"):
        from worker.service.worker import run
    click.get_current_context().exit(run(settings))
