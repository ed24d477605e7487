"How a model is made sparse: masks, scores, allocation, selection, schedules, the report and `Sparsifier`"
