"""Training: recipes, data, objectives, checkpoints and the one loop that runs them."""
