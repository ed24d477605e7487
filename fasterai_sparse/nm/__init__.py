"N:M patterns: the search for the best order of channels, permuting a model into it, and checking the pattern"
