"N:M patterns: the search for the best order of channels, permuting a model into it, and proof that the pattern is there"
