"""What is wrong with a recipe's data and model, found before a weight is read."""
