"""Results of commands, as tables of at most 100 columns and as plain values for --json.

analysis     mlprune analyze
claims       the tests of a sweep's claims
comparison   mlprune compare
live         progress of running sweeps: live table, plain lines, mlprune status
page         the sweep's description on its MLflow page, in Markdown
plan         mlprune plan
ranking      the rows of a sweep's ranking, shared by terminal and MLflow page
sweep        mlprune sweep and mlprune evaluate
tables       what the tables of several commands share
"""
