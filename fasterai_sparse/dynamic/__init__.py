"Masks that move during training: random masks, dropping and growing weights, and the callback"
