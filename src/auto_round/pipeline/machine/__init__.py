"""The machine a job runs on: devices, memory, cores, clocks, and what arithmetic they are held to."""
