"""What everything else stands on: messages, names, clocks and the wire. Imports nothing of ours."""
