"""What comes from outside and is kept: models, texts and tasks, how they are cut, and the cache their files lie in."""
