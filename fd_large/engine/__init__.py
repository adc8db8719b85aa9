"""DeepSpeed: its JSON, the build of a run, the sharded teacher, optimiser, schedule and loop."""
