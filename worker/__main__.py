"""`python -m worker` is `tokenfleet worker`."""

from worker.cli import worker

if __name__ == "__main__":
    worker(prog_name="tokenfleet worker")
