"""The control loop: what is known of the cluster, who decides, and what nodes are told."""
