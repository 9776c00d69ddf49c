"""What a recipe trains its model for, and everything that follows from it."""
