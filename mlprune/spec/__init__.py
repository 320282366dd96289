"""What the user writes: the spec of a sweep, and the text forms of calibrations, scores and patterns.

schema        the whole spec, as frozen pydantic models
search        its section `search`
evaluation    its section `evaluation`
claims        its section `claims`
limits        limits on texts, paths and numbers
section       what the sections share
loading       a YAML file and `key=value` settings, to a checked spec
calibrations  demonstrations, and combinations of them
mixtures      the section `mixture` of a search: mixtures whose weights are searched
pretraining   weights of a mixture by the languages' shares in pretraining
variants      what one trial is, with its text form and content key
languages     language codes and names
templates     checks of templates with slots
urls          secrets in addresses: found, refused, redacted
"""
