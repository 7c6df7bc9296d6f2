"""What the notebooks stand on: how they look (`notebook`), short trainings (`fit`), and the marking (`checks`)."""
