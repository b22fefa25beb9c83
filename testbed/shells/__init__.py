"""The shells around the control plane: what waits, jumps, connects and starts processes."""
