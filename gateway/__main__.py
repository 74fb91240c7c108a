"""`python -m gateway` is `tokenfleet gateway`."""

from gateway.cli import gateway

if __name__ == "__main__":
    gateway(prog_name="gateway")
