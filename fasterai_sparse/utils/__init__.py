"Helpers that know nothing of sparsity: batches, model modes, files, checks, timing and the compiled library"
