"Masks that move while a sparse network learns: random masks, drop and grow, and the callback"
