"""Python imports this at start-up when its folder is on PYTHONPATH."""

import no_network_guard  # noqa: F401
