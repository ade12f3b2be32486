"""Around a run: the host loop, devices, logs, curves, progress, operations counted, peaks measured."""
