"Inference that skips zeros: operations, packed weights, plans, and `accelerate`"
