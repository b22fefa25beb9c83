"""Hardware-in-the-loop emulation testbed for clouds that serve LLMs and multimodal models."""
