"""What a run is: cells and keys, budgets, and what every layer is stored as under one."""
