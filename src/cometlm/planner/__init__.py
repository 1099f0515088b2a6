"""What training a long sample would take: counted, measured, simulated, drawn."""
