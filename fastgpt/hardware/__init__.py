"""The machine: GPUs and their peaks (``cards``), the choice of a device (``device``), clock and power now (``telemetry``), the
environment report (``environment``)."""
