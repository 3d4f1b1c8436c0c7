"""The model: load or assemble a LLaVA, choose what is trained, and the objective that trains it."""
