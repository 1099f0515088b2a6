"""The mathematics: chunks and layers, the cell, the walks, and the models made of them."""
