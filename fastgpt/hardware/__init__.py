"""The machine: GPUs and their peaks (``cards``), measured ceilings (``ceilings``), the choice of a device (``device``), the
environment report (``environment``)."""
