"The sparsity algorithms of NNCF: RB, magnitude and constant sparsity, schedules by epoch and configuration files"
