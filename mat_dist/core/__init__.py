"""The training: trainer, step, guard, cohort, peer, graph, objective, losses, optimizer, hooks, monitor."""
