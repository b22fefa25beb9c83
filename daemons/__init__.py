"""What runs on each node: reads its devices, obeys commands, and keeps them safe."""
