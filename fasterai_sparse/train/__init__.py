"Masks in a fastai fit: keeping them, moving them along a schedule, optimizer state, BatchNorm and lottery tickets"
