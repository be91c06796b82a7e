"""Models, texts and tasks: where they come from, and how they are cut."""
