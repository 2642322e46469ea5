"""The command line: verbs over the core, the exporters and the harness; the only place that knows all three."""
