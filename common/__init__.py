"""The ground floor: errors, files, CSV, checkpoints, run directories, NaN checks, devices. Imports nothing above it."""
