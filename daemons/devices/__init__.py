"""The devices of a node. Each file turns one outside interface into ours, units and errors
included; above it there are watts, seconds, bytes and `testbed.core.errors.DeviceError`."""
