"The N:M pattern: searching the channel order that keeps most, permuting a model into it, and proving the pattern"
