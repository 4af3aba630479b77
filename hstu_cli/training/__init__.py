"""Training of the ranking model: examples from users' events, losses, the loop, and its folder on disk."""
