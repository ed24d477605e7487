"NNCF's sparsity algorithms, schedules and configuration files"
