"""One depth-pruning method per file, each a :class:`sglp_deploy.plan.Planner`; ``make_plan`` finds them by name."""
