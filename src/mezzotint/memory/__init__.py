"""How much memory a run takes (`footprint`, `system`), and which placement keeps a budget (`planner`)."""
