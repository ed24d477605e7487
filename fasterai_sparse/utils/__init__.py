"What knows nothing of sparsity: batches, model modes, files, checks, timing and the compiled library"
